"""What all launchers share: the device, the precision, products, and the start of kernels."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Options of compiled kernels. Triton 3.10 changes the default.
COMPILE = {"enable_fp_fusion": True}

# set by plans, see `starts`
repeated: Callable[[int], contextlib.AbstractContextManager] | None = None


def starts(size: int, step: int) -> Iterator[int]:
    """Yields the first rows of chunks of `step` rows.

    In a plan, yields only those of the first two chunks and of the last: the others would do the
    same as the second, which therefore runs in the context `repeated(count)`.
    """
    rows = range(0, size, step)
    if repeated is None or len(rows) < 4:
        yield from rows
        return
    for row, count in ((rows[0], 1), (rows[1], len(rows) - 2), (rows[-1], 1)):
        with repeated(count):
            yield row


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Context that makes the tensor's device the current one."""
    return torch.cuda.device_of(tensor)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture_and_processors(tensor: Tensor) -> tuple[int, int]:
    """Returns architecture and number of multiprocessors of the tensor's device."""
    return _device(tensor.device.index)


def precision_of(dtype: torch.dtype) -> str:
    """Returns the precision of products, of tuning.PRECISIONS."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def _warn(name: str, spills: int, architecture: int) -> None:
    from triton import __version__ as version

    warnings.warn(
        f"{name}: expected no spilled registers on sm_{architecture}, got {spills} from Triton "
        f"{version}; it runs slower than without spills",
        RuntimeWarning,
        stacklevel=3,
    )


def product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Writes left right to out [M, N], or adds it if `add`.

    out is float32, since cuBLAS may add parts of a long sum in the dtype of out.
    """
    wide = {"out_dtype": torch.float32} if left.dtype != torch.float32 else {}
    if add:
        torch.addmm(out, left, right, out=out, **wide)
    else:
        torch.mm(left, right, out=out, **wide)


def start(kernel: Any, programs: int, args: tuple, options: dict[str, Any]) -> Any:
    """Starts a kernel. Returns the compiled kernel."""
    return kernel[(programs,)](*args, **options)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Starts a kernel with this number of programs.

    Warns, once per kernel, if the compiler spilled registers. The gates (make aot) check that no
    kernel spills with their versions of Triton; other versions may spill.
    """
    compiled = start(kernel, programs, args, {**options, **COMPILE})
    if getattr(compiled, "n_spills", 0):
        _warn(compiled.name, compiled.n_spills, compiled.metadata.target.arch)


@functools.cache
def splits(blocks: int, tiles: int, slots: int) -> tuple[int, int]:
    """Returns the number of ranges of each block's tiles, and the tiles in a range, if `slots`
    programs run at a time.

    The cost is the number of rounds of programs times tiles per range; half a tile is added for the
    other work of a program, so that few large ranges are preferred if they fill the device equally
    well.
    """
    limit = min(tiles, max(8, -(-2 * slots // blocks)))

    def cost(ranges: int) -> float:
        return -(-blocks * ranges // slots) * (-(-tiles // ranges) + 0.5)

    per_split = -(-tiles // min(range(1, limit + 1), key=cost))
    return -(-tiles // per_split), per_split
