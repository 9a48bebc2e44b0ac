"""What launchers ask of the device: its architecture, a precision, and how many programs to cut work into."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from simplclip.kernels import tuning

# What a compiled kernel gets beside its arguments. Triton 3.10 changes the default.
COMPILE = {"enable_fp_fusion": True}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture_and_processors(tensor: Tensor) -> tuple[int, int]:
    """Architecture and number of multiprocessors; the interpreter's are made up so that small calls split their columns."""
    return (tuning.INTERPRETER, 4) if interpreted() else _device(tensor.device.index)


def precision_of(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not interpreted()
    return tuning.precision_of(dtype, tf32)


@functools.cache
def splits(blocks: int, tiles: int, slots: int) -> tuple[int, int]:
    """Ranges that each block's tiles are cut into, and tiles per range, for `slots` programs that run at a time.

    The fewest rounds of programs count; half a tile stands for what a program does beside its tiles, so that few large
    ranges win where they fill the device as well.
    """
    most = min(tiles, max(8, -(-2 * slots // blocks)))

    def cost(ranges: int) -> float:
        return -(-blocks * ranges // slots) * (-(-tiles // ranges) + 0.5)

    per_split = -(-tiles // min(range(1, most + 1), key=cost))
    return -(-tiles // per_split), per_split
