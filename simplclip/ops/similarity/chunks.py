"""How similarity_loss divides its work into chunks, and the memory that they take."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from simplclip.ops import backends
from simplclip.ops.dtypes import accumulate_dtype

# Budget in bytes of a chunk, some rows of a similarity matrix. A chunk has no more rows than fast matrix products need.
SCRATCH_BYTES = 64 << 20
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096  # so that each of a GPU's 82 or more multiprocessors has a tile of the product G Y; not measured
# Budget of the first rows of the similarity matrices, which forward keeps so that backward does not compute them again.
STORE_BYTES = 36 << 20
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the matrix products: that of the features, or float32 for half types that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and backends.native_bf16 else torch.float32
    return dtype


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


def stored_rows(n: int, m: int, dtype: torch.dtype, matrices: int, store_bytes: int = STORE_BYTES) -> int:
    """Rows of each similarity matrix that forward keeps: all rows if they fit; else, of a single matrix, those that fit.

    With several matrices the rows that fit would save only a few hundredths of the work.
    """
    rows = store_bytes // (m * dtype.itemsize * matrices)
    if rows >= n:
        return n
    return rows // _STRIP * _STRIP if matrices == 1 else 0
