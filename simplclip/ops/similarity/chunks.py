"""The chunks into which similarity_loss divides its work, and its budgets of memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from simplclip.common.tuned import tuned
from simplclip.ops import backends
from simplclip.ops.calls import accumulate_dtype

# Budgets in bytes, on a CPU and elsewhere. SCRATCH: a chunk, which has no more rows of a similarity matrix than fast matrix
# products need. STORE: the first rows of the matrices, which forward keeps so that backward need not compute them again.
# A GPU reads and writes gradients for every block, so that larger blocks cost it less.
SCRATCH_BYTES, _SCRATCH_BYTES_ELSEWHERE = 64 << 20, 128 << 20
STORE_BYTES, _STORE_BYTES_ELSEWHERE = 36 << 20, 256 << 20
SCRATCH, STORE = "scratch bytes of similarity_loss", "store bytes of similarity_loss"  # the names of the choices
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096  # so that each of a GPU's 82 or more multiprocessors has a tile of the product G Y; not measured
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype of the products: the features' dtype, or float32 for half types that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and backends.native_bf16 else torch.float32
    return dtype


def default_budgets(device: str) -> dict[str, int]:
    """Returns the bytes of scratch and of kept rows that apply where neither the caller nor `simplclip tune` chose them."""
    cpu = device == "cpu"
    return {
        SCRATCH: SCRATCH_BYTES if cpu else _SCRATCH_BYTES_ELSEWHERE,
        STORE: STORE_BYTES if cpu else _STORE_BYTES_ELSEWHERE,
    }


def budgets(device: str, dtype: torch.dtype, scratch_bytes: int | None, store_bytes: int | None) -> tuple[int, int]:
    """Returns the bytes of scratch and of kept rows: the given ones, else those tuned for the dtype, else the defaults."""
    defaults, given = default_budgets(device), {SCRATCH: scratch_bytes, STORE: store_bytes}
    scratch, store = (tuned(what, dtype, device, defaults[what]) if given[what] is None else given[what] for what in given)
    return scratch, store


def prepare(call, names: Iterable[str], dtype: torch.dtype) -> None:
    """Makes a call's tensors contiguous. Casts matrices to `dtype`, that of the products, and others to the dtype of sums."""
    sums = accumulate_dtype(dtype)
    for name in names:
        tensor = getattr(call, name)
        if tensor is not None:
            tensor = tensor.contiguous()
            if tensor.is_floating_point():
                tensor = tensor.to(dtype if tensor.dim() == 2 else sums)
            setattr(call, name, tensor)


def chunk_rows(n: int, m: int, dtype: torch.dtype, device: str, live: int = 1, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Returns the rows per chunk: as many as scratch_bytes holds, at most 1024 (GPU: 4096) / `live`.

    live: matrices that exist at a time. The result is a multiple of 64, and the chunks are about equally large.
    """
    rows = _CHUNK_ROWS.get(device, _CHUNK_ROWS_ELSEWHERE) // live
    most = min(rows, max(_STRIP, scratch_bytes // (m * dtype.itemsize) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def sweep_rows(n: int, m: int, dtype: torch.dtype, device: str, live: int, scratch_bytes: int) -> int:
    """Returns a call's `chunk`: the rows that scratch_bytes holds. On a GPU the matrices' blocks together have that size."""
    if device == "cpu":
        return chunk_rows(n, m, dtype, device, live, scratch_bytes)
    return min(n, max(1, scratch_bytes // (m * dtype.itemsize)))


def stored_rows(n: int, m: int, dtype: torch.dtype, matrices: int, store_bytes: int, strip: int) -> int:
    """Returns how many rows of each matrix forward keeps: all if they fit; else, of a single matrix, those that fit.

    Rows that fit are a multiple of `strip`. Of several matrices none are kept: they would save a few hundredths of the work.
    """
    rows = store_bytes // (m * dtype.itemsize * matrices)
    if rows >= n:
        return n
    return rows // strip * strip if matrices == 1 else 0
