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


def stored_rows(n: int, m: int, dtype: torch.dtype, matrices: int, store_bytes: int = STORE_BYTES) -> int:
    """Rows that forward keeps of all similarity matrices: all of them; else of one alone what fits, in multiples of 64.

    Of several, the rows that fit would save a few hundredths of the work.
    """
    rows = store_bytes // (m * dtype.itemsize * matrices)
    if rows >= n:
        return n
    return rows // _STRIP * _STRIP if matrices == 1 else 0


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

    Forward and backward form each similarity matrix; two products for the student's gradients, one for each of interactive's
    matrices. Interactive "infonce" needs two for each of its directions (similarity_rows). On a CPU stored rows save a part;
    on a GPU, whose kernels keep tiles in registers, each matrix is formed again, that of "infonce" too.
    """
    relational, cross = "relational" in terms, "interactive" in terms
    student, kl = "contrastive" in terms or relational or "pair_matching" in terms, cross and interactive == "kl"
    matrices = student + (relational or kl) + 2 * kl
    kept = stored_rows(n, m, computes_in(dtype, device), matrices, store_bytes) / n if device == "cpu" else 0
    rows = 4 if device == "cpu" else 6
    return matrices * (2 - kept) + 2 * student + (2 if interactive == "kl" else rows) * cross
