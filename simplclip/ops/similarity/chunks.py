"""How similarity_loss divides its work into chunks, and the memory that they take."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from simplclip.common.tuned import tuned
from simplclip.ops import backends
from simplclip.ops.dtypes import accumulate_dtype

# Budgets in bytes, on a CPU and elsewhere: of a chunk, some rows of a similarity matrix, which has no more rows than fast
# matrix products need; and of the first rows of the matrices, which forward keeps so that backward need not compute them.
# A GPU reads and writes gradients for every block, so that larger ones cost it less.
SCRATCH_BYTES, _SCRATCH_BYTES_ELSEWHERE = 64 << 20, 128 << 20
STORE_BYTES, _STORE_BYTES_ELSEWHERE = 36 << 20, 256 << 20
SCRATCH, STORE = "scratch bytes of similarity_loss", "store bytes of similarity_loss"  # the names of the choices
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096  # so that each of a GPU's 82 or more multiprocessors has a tile of the product G Y; not measured
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the matrix products: that of the features, or float32 for half types that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and backends.native_bf16 else torch.float32
    return dtype


def default_budgets(device: str) -> dict[str, int]:
    """The bytes of scratch and of kept rows where neither the caller nor `simplclip tune` has chosen them."""
    cpu = device == "cpu"
    return {
        SCRATCH: SCRATCH_BYTES if cpu else _SCRATCH_BYTES_ELSEWHERE,
        STORE: STORE_BYTES if cpu else _STORE_BYTES_ELSEWHERE,
    }


def budgets(device: str, dtype: torch.dtype, scratch_bytes: int | None, store_bytes: int | None) -> tuple[int, int]:
    """The budgets, which are by default those of the device and of the features' dtype."""
    defaults, given = default_budgets(device), {SCRATCH: scratch_bytes, STORE: store_bytes}
    scratch, store = (tuned(what, dtype, device, defaults[what]) if given[what] is None else given[what] for what in given)
    return scratch, store


def prepare(call, names: Iterable[str], dtype: torch.dtype) -> None:
    """Makes tensors of a call contiguous, and casts matrices to the dtype of their products, numbers to that of the sums."""
    sums = accumulate_dtype(dtype)
    for name in names:
        tensor = getattr(call, name)
        if tensor is not None:
            tensor = tensor.contiguous()
            if tensor.is_floating_point():
                tensor = tensor.to(dtype if tensor.dim() == 2 else sums)
            setattr(call, name, tensor)


def chunk_rows(n: int, m: int, dtype: torch.dtype, device: str, live: int = 1, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Rows per chunk: as many as scratch_bytes holds, at most 1024 (GPU: 4096) in all of `live` matrices at a time.

    A multiple of 64; the chunks are about equal.
    """
    rows = _CHUNK_ROWS.get(device, _CHUNK_ROWS_ELSEWHERE) // live
    most = min(rows, max(_STRIP, scratch_bytes // (m * dtype.itemsize) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def sweep_rows(n: int, m: int, dtype: torch.dtype, device: str, live: int, scratch_bytes: int) -> int:
    """The field `chunk` of a call, as many rows as scratch_bytes holds. A GPU's blocks have as many elements together."""
    if device == "cpu":
        return chunk_rows(n, m, dtype, device, live, scratch_bytes)
    return min(n, max(1, scratch_bytes // (m * dtype.itemsize)))


def stored_rows(n: int, m: int, dtype: torch.dtype, matrices: int, store_bytes: int, strip: int) -> int:
    """Rows of each similarity matrix that forward keeps: all rows if they fit; else, of a single matrix, those that fit.

    These are a multiple of `strip`. With several matrices the rows that fit would save only a few hundredths of the work.
    """
    rows = store_bytes // (m * dtype.itemsize * matrices)
    if rows >= n:
        return n
    return rows // strip * strip if matrices == 1 else 0
