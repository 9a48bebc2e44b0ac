"""The cards that plans know, from NVIDIA's data sheets and white papers."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A data sheet.

    Rates are peaks: dense, without sparsity, products of half types summed in float32.
    """

    memory: int  # GiB
    architecture: int  # compute capability, 86 for 8.6
    multiprocessors: int
    bandwidth: float  # GB/s
    l2: int  # MiB
    half: float  # TFLOP/s of bfloat16 and float16 in tensor cores
    tf32: float  # TFLOP/s of float32 as TF32 in tensor cores
    float32: float  # TFLOP/s outside tensor cores

    @property
    def triton(self) -> bool:
        """Whether the library's Triton kernels run on it; it also has bfloat16 then."""
        return self.architecture >= 80


# GeForce cards multiply half types at half the rate if they sum in float32, which torch does; the
# others do not. A100, H100 and H200 are SXM modules, V100 is SXM2. The RTX 3080 is that of 10 GB.
# T4 and V100 have neither bfloat16 nor TF32.
CARDS = {
    "rtx-3060": Card(12, 86, 28, 360, 3, 25.5, 12.7, 12.7),
    "rtx-3080": Card(10, 86, 68, 760, 5, 59.5, 29.8, 29.8),
    "rtx-3090": Card(24, 86, 82, 936, 6, 71.2, 35.6, 35.6),
    "rtx-4060-ti": Card(16, 89, 34, 288, 32, 44.1, 22.1, 22.1),
    "rtx-4070-ti-super": Card(16, 89, 66, 672, 48, 88.2, 44.1, 44.1),
    "rtx-4080": Card(16, 89, 76, 717, 64, 97.5, 48.7, 48.7),
    "rtx-4090": Card(24, 89, 128, 1008, 72, 165.2, 82.6, 82.6),
    "rtx-5070-ti": Card(16, 120, 70, 896, 48, 87.9, 43.9, 43.9),
    "rtx-5080": Card(16, 120, 84, 960, 64, 112.6, 56.3, 56.3),
    "rtx-5090": Card(32, 120, 170, 1792, 96, 209.5, 104.8, 104.8),
    "t4": Card(16, 75, 40, 320, 4, 65, 8.1, 8.1),
    "v100": Card(16, 70, 80, 900, 6, 125, 15.7, 15.7),
    "a10": Card(24, 86, 72, 600, 6, 125, 62.5, 31.2),
    "l4": Card(24, 89, 58, 300, 48, 121, 60, 30.3),
    "rtx-a6000": Card(48, 86, 84, 768, 6, 154.8, 77.4, 38.7),
    "l40s": Card(48, 89, 142, 864, 96, 362, 183, 91.6),
    "a100-40": Card(40, 80, 108, 1555, 40, 312, 156, 19.5),
    "a100-80": Card(80, 80, 108, 2039, 40, 312, 156, 19.5),
    "h100": Card(80, 90, 132, 3352, 50, 989.4, 494.7, 66.9),
    "h200": Card(140, 90, 132, 4800, 50, 989.4, 494.7, 66.9),
}
