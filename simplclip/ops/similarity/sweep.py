"""How similarity_loss divides its work, and the memory that it takes."""

from __future__ import annotations

import torch

from simplclip.ops import backends

# A chunk of rows of a similarity matrix: as few rows as keep the matrix products fast, within this budget.
SCRATCH_BYTES = 64 << 20
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096  # rows that give a GPU's 82 multiprocessors and more a tile of G Y each; not measured
# The first rows of the similarity matrices are kept from forward to backward, which then need not multiply them again.
STORE_BYTES = 36 << 20
# What oneDNN packs inside one bfloat16 product; the most seen was 2.8 MB on two threads.
_PACKING_BYTES = 4 << 20
_STRIP = 64  # the chunk is a multiple of what one task of the CPU kernel takes


def computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the matrix products: the features', but float32 for halves that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return dtype if dtype == torch.bfloat16 and backends.native_bf16 else torch.float32
    return dtype


def chunk_rows(n: int, m: int, dtype: torch.dtype, device: str, live: int = 1, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Rows per chunk: what the scratch holds, in `live` matrices at once at most 1024 (GPU: 4096), in equal chunks.

    A multiple of 64, and at least that.
    """
    rows = _CHUNK_ROWS.get(device, _CHUNK_ROWS_ELSEWHERE) // live
    most = min(rows, max(_STRIP, scratch_bytes // (m * dtype.itemsize) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def stored_rows(n: int, m: int, dtype: torch.dtype, planes: int, store_bytes: int = STORE_BYTES) -> int:
    """Rows that forward keeps of all similarity matrices: all of them; else of one alone what fits, in multiples of 64.

    Of several, the rows that fit would save a few hundredths of the work.
    """
    rows = store_bytes // (m * dtype.itemsize * planes)
    if rows >= n:
        return n
    return rows // _STRIP * _STRIP if planes == 1 else 0


def products(softmax: bool, columns: bool, negatives: int, relational: bool, interactive: bool) -> int:
    """Similarity matrices of the sweep: Z, T and, for interactive "kl", U and V; the hadamard plane's not counted."""
    return bool(softmax or negatives) + bool(relational or interactive) + interactive * (1 + columns)


def matrix_products(
    n: int,
    m: int,
    dtype: torch.dtype,
    device: str,
    terms: tuple[str, ...],
    *,
    interactive: str = "infonce",
    store_bytes: int = STORE_BYTES,
) -> float:
    """Matrix products of N·M·D in a symmetric forward and backward with a scalar plane.

    Forward and backward form each similarity matrix; two products for Z's gradients, one for U's and one for V's. Interactive
    "infonce" needs two for each of its directions (similarity_rows). On a CPU stored rows save a part; on a GPU, whose
    kernels keep tiles in registers, each matrix is formed again, that of "infonce" too.
    """
    relational, cross = "relational" in terms, "interactive" in terms
    z = "contrastive" in terms or relational or "pair_matching" in terms
    planes = products(z, True, False, relational, cross and interactive == "kl")
    kept = stored_rows(n, m, computes_in(dtype, device), planes, store_bytes) / n if device == "cpu" else 0
    rows = 4 if device == "cpu" else 6
    return planes * (2 - kept) + 2 * z + (2 if interactive == "kl" else rows) * cross


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

    The stored rows, a chunk of a student's and one of the teacher's matrix; the larger of 64-row partials of the column
    statistics (forward) and, in bfloat16, float32 sums of the text gradients and oneDNN's packing (backward). A half dtype
    that this CPU does not multiply is computed in float32: then copies of features and gradients. The teacher's features
    count as of this dtype.
    """
    compute = computes_in(dtype, "cpu")
    kl, cross = interactive == "kl", interactive is not None
    count = products(contrastive or relational or hard, True, hadamard, relational, kl)
    teacher = relational or kl
    chunk = min(n, chunk_rows(n, m, compute, "cpu", 1 + teacher, scratch_bytes))
    logits = (
        ((1 + teacher + hadamard) * chunk + count * stored_rows(n, m, compute, count, store_bytes)) * m * compute.itemsize
    )
    statistics_of_columns = 1 + hard + 2 * relational + 3 * kl
    partials = -(-chunk // _STRIP) * m * 4 * statistics_of_columns
    sums = 2 * chunk * d * compute.itemsize if hadamard else 0
    widths = d + (teacher_width if cross and teacher_width not in (None, d) else 0)
    if compute == torch.bfloat16:
        sums += m * widths * 4 + _PACKING_BYTES
    copies = 0
    mean_keys = 2 * (n + m) * (teacher_width or d) * dtype.itemsize * (interactive == "infonce")
    if compute != dtype:
        copies = 2 * (n + m) * widths + (n + m) * (teacher_width or d) * (relational or cross)
    statistics = 4 * (3 * 12 * n + 3 * 6 * m) + 4 * 4 * m
    return logits + max(partials, sums) + copies * compute.itemsize + mean_keys + statistics
