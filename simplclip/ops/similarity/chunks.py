"""The chunks into which similarity_loss divides its work, and its budgets of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends

# Budget of a chunk, which has no more rows of a similarity matrix than fast matrix products need. A
# GPU reads and writes gradients for every block, so that larger blocks cost it less.
SCRATCH_BYTES = 64 << 20
SCRATCH_BYTES_ELSEWHERE = 128 << 20
# Budget of the first rows of the matrices, which forward keeps so that backward need not compute
# them again; only the CPU's kernels do.
STORE_BYTES = 208 << 20
_STATISTICS_BYTES = 40  # about what forward computes of a row and of a column
_CHUNK_ROWS = 1024
_FEW_ROWS = 448  # of a chunk, with which keeping all rows saves more time than small products cost
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype of products of features: theirs, or float32 where a CPU lacks theirs."""
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    if dtype == torch.bfloat16 and backends.native_bf16:
        return dtype
    return torch.float32


def _rows_of_both(image: Tensor, m: int) -> int:
    """Returns how many rows of [N, m] a chunk and the rows that forward keeps have by default.

    They take, with the statistics, at most twice the bytes of the features' gradients in float32.
    """
    n, width = image.shape
    row_bytes = m * computes_in(image.dtype, "cpu").itemsize
    return max(0, (n + m) * (8 * width - _STATISTICS_BYTES)) // row_bytes


def sweep_rows(
    image: Tensor, m: int, live: int, scratch_bytes: int | None, *, keeps: bool = False
) -> int:
    """Returns a call's `chunk`: the rows of [N, m] that scratch_bytes holds, of `live` matrices.

    On a CPU a multiple of 64 that makes chunks about equally large; by default those of a single
    matrix are among _rows_of_both. keeps: whether the rows of stored_rows come from them too.
    """
    n = image.shape[0]
    device = image.device.type
    row_bytes = m * computes_in(image.dtype, device).itemsize
    if device != "cpu":
        rows = (SCRATCH_BYTES_ELSEWHERE if scratch_bytes is None else scratch_bytes) // row_bytes
        return min(n, max(1, rows))
    rows = (SCRATCH_BYTES if scratch_bytes is None else scratch_bytes) // row_bytes
    most = min(_CHUNK_ROWS // live, rows)
    if scratch_bytes is None and live == 1:
        both = _rows_of_both(image, m)
        most = min(most, both)
        if keeps and both - n >= _FEW_ROWS:
            most = min(most, both - n)
    most = max(_STRIP, most // _STRIP * _STRIP)
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def stored_rows(image: Tensor, m: int, matrices: int, store_bytes: int | None, chunk: int) -> int:
    """Returns how many of the N rows of each matrix forward keeps for backward: all if they fit.

    Else those of a single matrix that fit, a multiple of 64, and none of two, where they would save
    little. 0 unless the CPU's C++ kernels run. store_bytes: None for 208 MiB, and of a single
    matrix for what a chunk leaves of _rows_of_both; the loss then takes less memory than torch's
    linear_cross_entropy in chunks.
    """
    n = image.shape[0]
    dtype = computes_in(image.dtype, "cpu")
    spec = backends.forced()
    if image.device.type != "cpu" or dtype == torch.float64 or backends.extension is None:
        return 0  # only the CPU's kernels keep rows
    if spec and backends.forced_for("similarity_loss_fwd", spec) not in ("", "cpu"):
        return 0
    row_bytes = m * dtype.itemsize * matrices
    rows = (STORE_BYTES if store_bytes is None else store_bytes) // row_bytes
    if store_bytes is None and matrices == 1:
        rows = min(rows, max(0, _rows_of_both(image, m) - chunk))
    if rows >= n:
        return n
    if matrices > 1:
        return 0
    return rows // _STRIP * _STRIP
