"""The chunks into which similarity_loss divides its work, and its budgets of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends

# Budgets in bytes, on a CPU and elsewhere. SCRATCH: a chunk, which has no more rows of a similarity
# matrix than fast matrix products need. STORE: the first rows of the matrices, which forward keeps
# so that backward need not compute them again; only the CPU's kernels do. A GPU reads and writes
# gradients for every block, so that larger blocks cost it less.
SCRATCH_BYTES, SCRATCH_BYTES_ELSEWHERE = 64 << 20, 128 << 20
STORE_BYTES = 208 << 20
_CHUNK_ROWS, _CHUNK_ROWS_ELSEWHERE = 1024, 4096
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype of the products: the features' dtype, or float32 for half types that this
    CPU cannot multiply.
    """
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and backends.native_bf16 else torch.float32
    return dtype


def chunk_rows(
    n: int,
    m: int,
    dtype: torch.dtype,
    device: str,
    live: int = 1,
    scratch_bytes: int = SCRATCH_BYTES,
) -> int:
    """Returns the rows per chunk: as many as scratch_bytes holds, at most 1024 (GPU: 4096) /
    `live`.

    live: matrices that exist at a time. The result is a multiple of 64, and the chunks are about
    equally large.
    """
    rows = (_CHUNK_ROWS if device == "cpu" else _CHUNK_ROWS_ELSEWHERE) // live
    most = min(rows, max(_STRIP, scratch_bytes // (m * dtype.itemsize) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def sweep_rows(image: Tensor, m: int, live: int, scratch_bytes: int | None) -> int:
    """Returns a call's `chunk`: the rows that scratch_bytes holds.

    On a GPU the matrices' blocks together have that size.
    """
    n, device = image.shape[0], image.device.type
    dtype = computes_in(image.dtype, device)
    if device == "cpu":
        return chunk_rows(
            n, m, dtype, device, live, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
        )
    scratch_bytes = SCRATCH_BYTES_ELSEWHERE if scratch_bytes is None else scratch_bytes
    return min(n, max(1, scratch_bytes // (m * dtype.itemsize)))


def stored_rows(image: Tensor, m: int, matrices: int, store_bytes: int | None) -> int:
    """Returns how many rows of each matrix forward keeps: all if they fit; else, of a single
    matrix, those that fit.

    Rows that fit are a multiple of 64. Of several matrices none are kept: they would save a few
    hundredths of the work.
    """
    n = image.shape[0]
    dtype = computes_in(image.dtype, "cpu")
    spec = backends.forced()
    if image.device.type != "cpu" or dtype == torch.float64 or backends.extension is None:
        return 0  # only the CPU's kernels keep rows
    if spec and backends.forced_for("similarity_loss_fwd", spec) not in ("", "cpu"):
        return 0
    rows = (STORE_BYTES if store_bytes is None else store_bytes) // (m * dtype.itemsize * matrices)
    if rows >= n:
        return n
    return rows // _STRIP * _STRIP if matrices == 1 else 0
