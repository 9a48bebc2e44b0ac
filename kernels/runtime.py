"""What all launchers share: the device, the precision, products, and the start of kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

# Options of compiled kernels. Triton 3.10 changes the default.
COMPILE = {"enable_fp_fusion": True}


@functools.cache
def card_of(index: int) -> tuple[int, int, int]:
    """Returns (architecture, multiprocessors, bytes of L2 cache) of the GPU of this index. Cached.

    For example (90, 132, 52428800).
    """
    properties = torch.cuda.get_device_properties(index)
    architecture = 10 * properties.major + properties.minor
    return architecture, properties.multi_processor_count, properties.L2_cache_size


def architecture_and_processors(tensor: Tensor) -> tuple[int, int]:
    """Returns the architecture of the tensor's GPU, e.g. 90, and its number of multiprocessors."""
    return card_of(tensor.device.index)[:2]


def cache_bytes(tensor: Tensor) -> int:
    """Returns the size of the L2 cache of the tensor's GPU."""
    return card_of(tensor.device.index)[2]


def precision_of(dtype: torch.dtype) -> str:
    """Returns the precision of products: "half", or of float32 "tf32" (if allowed) or "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def _warn(name: str, spills: int, architecture: int) -> None:
    """Warns, once for each set of arguments, that kernel `name` spills so many registers."""
    from triton import __version__ as version

    warnings.warn(
        f"{name}: expected no spilled registers on sm_{architecture}, got {spills} from Triton "
        f"{version}; it runs slower than without spills",
        RuntimeWarning,
        stacklevel=3,
    )


def product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Writes the matrix product left right to out [M, N] in place, or adds it to out if `add`.

    out is float32, since cuBLAS may add parts of a long sum in the dtype of out.
    """
    wide: dict[str, Any] = {"out_dtype": torch.float32} if left.dtype != torch.float32 else {}
    if add:
        torch.addmm(out, left, right, out=out, **wide)
    else:
        torch.mm(left, right, out=out, **wide)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Starts a Triton kernel with a grid of `programs`, its arguments and options (num_warps etc.).

    Warns, once per kernel, if the compiler spilled registers: with the versions of Triton of the
    gates (make aot) no kernel spills, with others it may.
    """
    compiled = kernel[(programs,)](*args, **{**options, **COMPILE})
    if getattr(compiled, "n_spills", 0):
        _warn(compiled.name, compiled.n_spills, compiled.metadata.target.arch)


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
