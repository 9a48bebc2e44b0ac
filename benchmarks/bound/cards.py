"""The cards that predicted times know, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A data sheet. Rates are peaks: dense, without sparsity, products of half types summed in float32."""

    memory: int  # GiB
    architecture: int  # compute capability, 86 for 8.6
    multiprocessors: int
    bandwidth: float  # GB/s
    l2: int  # MiB
    half: float  # TFLOP/s of bfloat16 and float16 in tensor cores
    tf32: float  # TFLOP/s of float32 as TF32 in tensor cores
    float32: float  # TFLOP/s outside tensor cores


# NVIDIA's whitepapers on the architectures GA102, Ada, RTX Blackwell, A100 (SXM4 modules) and H100 (SXM5).
CARDS = {
    "rtx-3090": Card(24, 86, 82, 936, 6, 71.2, 35.6, 35.6),
    "rtx-4090": Card(24, 89, 128, 1008, 72, 165.2, 82.6, 82.6),
    "rtx-5090": Card(32, 120, 170, 1792, 96, 209.5, 104.8, 104.8),
    "a100-80": Card(80, 80, 108, 2039, 40, 312, 156, 19.5),
    "h100": Card(80, 90, 132, 3352, 50, 989.4, 494.7, 66.9),
}
