"""How similarity_loss divides its work, and the memory that it takes."""

from __future__ import annotations

import torch

from simplclip import backends

# A chunk of rows of each similarity matrix: as few rows as keep the matrix products fast, within this budget.
SCRATCH_BYTES = 64 << 20
_CHUNK_ROWS = 1024
# The first rows of each similarity matrix are kept from forward to backward, which then need not multiply them again.
STORE_BYTES = 36 << 20
# What oneDNN packs inside one bfloat16 product; the most seen was 2.8 MB on two threads.
_PACKING_BYTES = 4 << 20
_STRIP = 64  # the chunk is a multiple of what one task of the CPU kernel takes


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the matrix products: the features', but float32 for halves that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        native = dtype == torch.bfloat16 and backends.extension is not None and backends.extension.has_native_bf16()
        return torch.bfloat16 if native else torch.float32
    return dtype


def chunk_rows(n: int, m: int, dtype: torch.dtype, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Rows per chunk: at most 1024 and what the scratch holds, in equal chunks, a multiple of 64 and at least 64."""
    most = min(_CHUNK_ROWS, max(_STRIP, scratch_bytes // (m * dtype.itemsize) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def stored_rows(n: int, m: int, dtype: torch.dtype, store_bytes: int = STORE_BYTES) -> int:
    """Rows of each similarity matrix that forward keeps: all or, where they do not fit, a multiple of 64."""
    rows = store_bytes // (m * dtype.itemsize)
    return n if rows >= n else rows // _STRIP * _STRIP


def products(softmax: bool, negatives: int, relational: bool, interactive: int) -> int:
    """Similarity matrices that the call forms: Z, T, U and V, the hadamard plane's not counted."""
    return bool(softmax or negatives) + bool(relational or interactive == 2) + 2 * bool(interactive)


def workspace_bytes(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    *,
    hadamard: bool = False,
    hard: bool = False,
    relational: bool = False,
    interactive: str | None = None,
    teacher_width: int | None = None,
    contrastive: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
    store_bytes: int = STORE_BYTES,
) -> int:
    """Bytes that the cpu backend allocates beside inputs and gradients, at most, in a forward and its backward.

    The stored rows and a chunk of each similarity matrix; the larger of 64-row partials of the column statistics (forward)
    and, in bfloat16, float32 sums of the text gradients and oneDNN's packing (backward). A half dtype that this CPU does not
    multiply is computed in float32: then copies of features and gradients. The teacher's features count as of this dtype.
    """
    compute = computes_in(dtype, "cpu")
    kl, cross = interactive == "kl", interactive is not None
    count = products(contrastive or relational or hard, hadamard, relational, 2 * kl or cross)
    chunk = min(n, chunk_rows(n, m, compute, scratch_bytes))
    logits = (count * (chunk + stored_rows(n, m, compute, store_bytes)) + hadamard * chunk) * m * compute.itemsize
    statistics_of_columns = 1 + hard + 2 * relational + cross + 2 * kl
    partials = -(-chunk // _STRIP) * m * 4 * statistics_of_columns
    sums = 2 * chunk * d * compute.itemsize if hadamard else 0
    widths = d + (teacher_width if cross and teacher_width not in (None, d) else 0)
    if compute == torch.bfloat16:
        sums += m * widths * 4 + _PACKING_BYTES
    if cross:
        sums += chunk * d * compute.itemsize
    copies = 0
    if compute != dtype:
        copies = 2 * (n + m) * widths + (n + m) * (teacher_width or d) * (relational or cross)
    statistics = 4 * (3 * 12 * n + 3 * 6 * m) + 4 * 4 * m
    return logits + max(partials, sums) + copies * compute.itemsize + statistics
