"""Assumptions of predicted times beside data sheets and machine code, and rates of multiprocessors per clock."""

from __future__ import annotations

from dataclasses import dataclass

# Assumed rates, not from data sheets: of cuBLAS in products of half types (TFLOP/s), of kernels from memory and from cache
# (TB/s). Products of other types are assumed to reach the same share of their peaks.
SUSTAINED = {
    "rtx-3090": (62, 0.85, 3.0),
    "rtx-4090": (150, 0.93, 5.0),
    "rtx-5090": (190, 1.65, 6.5),
    "rtx-3060": (22, 0.33, 1.2),
    "a100-40": (250, 1.4, 4.5),
    "a100-80": (250, 1.8, 4.5),
    "h100": (600, 2.8, 5.5),
}
LAUNCH_US = 2.0  # the least that a kernel takes on the device
HOST_US = 12.0  # time of the host for each kernel that it starts, in eager mode with autograd
MMA_SYNC_SM90 = 0.62  # share of Hopper's peak of products, which only wgmma reaches (Luo et al. 2024, arXiv 2402.13499)
DEPENDENT = 4  # clocks until a result can be used (Jia et al. 2018, arXiv 1804.06826); only other warps hide this wait
FLASH = 0.75  # share of cuBLAS's rate that FlashAttention reaches, over tokens padded to blocks of FLASH_BLOCK
FLASH_BLOCK = 128
CUBLAS_TILE, CUBLAS_DEPTH = 128, 512  # cuBLAS's unit of work; it splits sums where that fills the card
ASSUMPTIONS = (
    "cuBLAS reaches {0} TFLOP/s of half types, memory {1} TB/s, the cache {2} TB/s; own products at most cuBLAS's rate",
    f"a kernel takes at least {LAUNCH_US:g} µs; its pipes run in parallel, the parts of one block one after the other, those "
    f"of blocks that share a multiprocessor together; outside product loops a warp issues once in {DEPENDENT} clocks",
    "a tensor comes from memory once for each kernel; bank conflicts and clocks below boost cost nothing",
)


def lines(card: str) -> list[str]:
    return [line.format(*SUSTAINED[card]) for line in ASSUMPTIONS]


@dataclass(frozen=True)
class Multiprocessor:
    """Results a clock of one multiprocessor: CUDA C++ Programming Guide, "Arithmetic Instructions".

    fma: add, multiply and fused in float32. alu: comparisons, selections and integers. mufu: 2^x, 1/x and conversions.
    shared: bytes of shared memory a clock.
    """

    fma: int
    alu: int
    mufu: int = 16
    shared: int = 128


MULTIPROCESSORS = {
    80: Multiprocessor(64, 64),
    86: Multiprocessor(128, 64),
    89: Multiprocessor(128, 64),
    90: Multiprocessor(128, 64),
    120: Multiprocessor(128, 64),
}
