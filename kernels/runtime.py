"""What all launchers share: the card, the precision, products, and the start of kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Options of compiled kernels. Triton 3.10 changes the default.
COMPILE = {"enable_fp_fusion": True}


class Card(NamedTuple):
    """A GPU."""

    architecture: int  # e.g. 90
    processors: int  # multiprocessors
    cache: int  # bytes of the L2 cache


@functools.cache
def card_of(index: int) -> Card:
    """Returns the GPU of this index. Cached."""
    found = torch.cuda.get_device_properties(index)
    return Card(10 * found.major + found.minor, found.multi_processor_count, found.L2_cache_size)


def card(tensor: Tensor) -> Card:
    """Returns the tensor's GPU."""
    return card_of(tensor.device.index)


def precision_of(dtype: torch.dtype) -> str:
    """Returns the precision of products: "half", or of float32 "tf32" (if allowed) or "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Writes the matrix product left right to out [M, N] in place, or adds it to out if `add`.

    out is float32, since cuBLAS may add parts of a long sum in the dtype of out.
    """
    wide: dict[str, Any] = {"out_dtype": torch.float32} if left.dtype != torch.float32 else {}
    if add:
        torch.addmm(out, left, right, out=out, **wide)
    else:
        torch.mm(left, right, out=out, **wide)


def launch(kernel: Any, programs: int, *args: Any, of: Any = None, **options: Any) -> None:
    """Starts a Triton kernel with a grid of `programs`, its arguments and options (num_warps etc.).

    of: the op's call, whose fields are the arguments of their names, unless `options` has others;
    an argument that both lack is None.
    """
    if of is not None:
        options = {name: getattr(of, name, None) for name in kernel.arg_names} | options
    kernel[(programs,)](*args, **options, **COMPILE)


@functools.cache
def splits(blocks: int, tiles: int, slots: int, least: int = 1) -> tuple[int, int]:
    """Returns (ranges, tiles per range): how the tiles of each block of rows are divided.

    slots: programs that run at a time. least: ranges, where there are so many tiles. The cost is
    the number of rounds of programs times tiles per range, and half a tile for the other work of a
    program, which prefers large ranges. Cached.
    """
    least = min(least, tiles)
    limit = min(tiles, least + max(7, -(-2 * slots // blocks)))
    # more tiles in a range would make fewer ranges
    most = tiles // least
    sizes = [min(most, -(-tiles // ranges)) for ranges in range(least, limit + 1)]

    def cost(per_split: int) -> float:
        return -(-blocks * -(-tiles // per_split) // slots) * (per_split + 0.5)

    per_split = min(sizes, key=cost)
    return -(-tiles // per_split), per_split
