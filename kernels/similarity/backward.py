"""Backward kernel of similarity_loss: gradients of a chunk of each of the student's matrices, which are computed again."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LOG2E, narrowed, sigmoid
from simplclip.kernels.similarity.merge import (
    DIAGONAL_HADAMARD,
    DIAGONAL_IMAGE_TO_TEACHER,
    DIAGONAL_STUDENT,
    DIAGONAL_TEACHER_TO_TEXT,
    LSE_CROSS,
    LSE_STUDENT,
    LSE_TEACHER,
    MEAN_CROSS,
    MEAN_STUDENT,
    PAIR_MATCHING,
)
from simplclip.kernels.similarity.tile import negatives, product, weights

SUMS = 4  # d_scale, d_cross_scale, d_plane_weight (scalar), d_plane_bias


@triton.jit
def _base(lse):
    """A log-sum-exp in base 2; 0 without negatives, where all logits are -inf."""
    return tl.where(lse == -INF, 0.0, lse * LOG2E)


@triton.jit
def _total(tile):  # [BLOCK_M, BLOCK_N]
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _store(
    out, value, diagonal, positive, factors, MATRIX: tl.constexpr, stored, SCALED: tl.constexpr, INTERPRETED: tl.constexpr
):
    value = tl.where(positive, diagonal[:, None], value)
    if SCALED:
        value *= tl.load(factors + MATRIX)
    tl.store(out, narrowed(value, out.dtype.element_ty, INTERPRETED), stored)


@triton.jit(do_not_specialize=["n", "m", "label_offset", "first_row", "row_count", "row_blocks"])
def _similarity_gradient_kernel(
    image,  # [N, D]
    text,  # [M, D]
    teacher_image,  # [N, D̂], None without T, U and V; so are the others that are not read
    teacher_text,  # [M, D̂]
    projected_image,  # [N, D̂]
    projected_text,  # [M, D̂]
    scale,  # []
    teacher_scale,  # []
    cross_scale,  # []
    plane_weight,  # [] or, with L, [D]
    plane_bias,  # []
    ids,  # [N] int64
    text_ids,  # [M] int64
    rows,  # [12, N] statistics
    columns,  # [6, M]
    grad_rows,  # [12, N]
    grad_columns,  # [6, M]
    factors,  # [matrices], only if SCALED: what a matrix is multiplied by before it is rounded
    out,  # [matrices, chunk, out_stride]: those of the launch, in the order of launch.STUDENTS
    sums,  # [programs, 4]
    n,
    m,
    width,
    teacher_width,
    label_offset,
    first_row,
    row_count,
    row_blocks,
    out_stride,
    matrix_stride,
    HAS_STUDENT: tl.constexpr,
    HAS_HADAMARD: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_IMAGE_TO_TEACHER: tl.constexpr,
    HAS_TEACHER_TO_TEXT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALL_NEGATIVES: tl.constexpr,
    HARD_NEGATIVES: tl.constexpr,
    RELATIONAL: tl.constexpr,
    KL: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SCALED: tl.constexpr,
    ATTEND: tl.constexpr,  # U alone: the gradient to the logits, not to the similarities, so that it is the softmax itself
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile: writes G of each of the student's matrices, and adds to this program's sums of the scalars' gradients."""
    program = tl.program_id(0)
    at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = at < row_count
    row = first_row + at
    safe_row = tl.minimum(row, n - 1).to(tl.int64)
    column = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_column = tl.minimum(column, m - 1).to(tl.int64)

    row_stat = rows + safe_row
    column_stat = columns + safe_column
    row_grad = grad_rows + safe_row
    column_grad = grad_columns + safe_column
    positive = column[None, :] == row[:, None] + label_offset
    stored = row_inside[:, None] & (column < m)[None, :]
    out += at.to(tl.int64)[:, None] * out_stride + column[None, :]
    matrix_stride = tl.cast(matrix_stride, tl.int64)
    d_scale, d_cross, d_weight, d_bias = 0.0, 0.0, 0.0, 0.0

    row_ids = row
    if HAS_IDS:
        row_ids = tl.load(ids + safe_row)

    if HAS_TEACHER:
        raw = product(
            teacher_image, teacher_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
        t = tl.where(negative, raw * (tl.load(teacher_scale) * LOG2E), -INF)

    if HAS_IMAGE_TO_TEACHER:
        raw = product(
            projected_image, teacher_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        if HAS_TEACHER:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
        x_scale = tl.load(cross_scale)
        u = tl.where(negative, raw * (x_scale * LOG2E), -INF)
        g = tl.load(row_grad + LSE_CROSS * n)[:, None] * weights(u, _base(tl.load(row_stat + LSE_CROSS * n))[:, None])
        if KL:
            g -= tl.load(row_grad + MEAN_CROSS * n)[:, None] * weights(t, _base(tl.load(row_stat + LSE_TEACHER * n))[:, None])
        d_cross += _total(g * raw)
        image_to_teacher: tl.constexpr = HAS_STUDENT + HAS_HADAMARD
        diagonal = tl.load(row_grad + DIAGONAL_IMAGE_TO_TEACHER * n)
        if not ATTEND:
            g *= x_scale
        _store(
            out + image_to_teacher * matrix_stride, g, diagonal, positive, factors, image_to_teacher, stored, SCALED,
            INTERPRETED,
        )  # fmt: skip

    if HAS_TEACHER_TO_TEXT:
        raw = product(
            teacher_image, projected_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        if HAS_TEACHER:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
        x_scale = tl.load(cross_scale)
        v = tl.where(negative, raw * (x_scale * LOG2E), -INF)
        g = tl.load(column_grad + LSE_CROSS * m)[None, :] * weights(v, _base(tl.load(column_stat + LSE_CROSS * m))[None, :])
        if KL:
            g -= tl.load(column_grad + MEAN_CROSS * m)[None, :] * weights(
                t, _base(tl.load(column_stat + LSE_TEACHER * m))[None, :]
            )
        d_cross += _total(g * raw)
        teacher_to_text: tl.constexpr = HAS_STUDENT + HAS_HADAMARD + HAS_IMAGE_TO_TEACHER
        diagonal = tl.load(row_grad + DIAGONAL_TEACHER_TO_TEXT * n)
        _store(
            out + teacher_to_text * matrix_stride, g * x_scale, diagonal, positive, factors, teacher_to_text, stored,
            SCALED, INTERPRETED,
        )  # fmt: skip

    if HAS_STUDENT:
        raw = product(
            image, text, None, safe_row, safe_column, width, EVEN, False, PRECISION, INTERPRETED, BLOCK_K
        )  # fmt: skip
        if HAS_TEACHER:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
        z_scale = tl.load(scale)
        z = tl.where(negative, raw * (z_scale * LOG2E), -INF)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        h = g
        if RELATIONAL:
            g -= tl.load(row_grad + MEAN_STUDENT * n)[:, None] * weights(
                t, _base(tl.load(row_stat + LSE_TEACHER * n))[:, None]
            )
            if COLUMNS:
                base = _base(tl.load(column_stat + LSE_TEACHER * m))
                g -= tl.load(column_grad + MEAN_STUDENT * m)[None, :] * weights(t, base[None, :])
        if SOFTMAX:
            p = weights(z, _base(tl.load(row_stat + LSE_STUDENT * n))[:, None])
            g += tl.load(row_grad + LSE_STUDENT * n)[:, None] * p
            if HARD_NEGATIVES:
                h += tl.load(row_grad + PAIR_MATCHING * n)[:, None] * p
            if COLUMNS:
                p = weights(z, _base(tl.load(column_stat + LSE_STUDENT * m))[None, :])
                g += tl.load(column_grad + LSE_STUDENT * m)[None, :] * p
                if HARD_NEGATIVES:
                    h += tl.load(column_grad + PAIR_MATCHING * m)[None, :] * p
        d_scale += _total(g * raw)
        g *= z_scale
        if ALL_NEGATIVES:
            h = tl.where(z != -INF, tl.load(row_grad + PAIR_MATCHING * n)[:, None], 0.0)
        if ALL_NEGATIVES or HARD_NEGATIVES:
            bias = tl.load(plane_bias)
            if not HAS_HADAMARD:
                slope = tl.load(plane_weight)
                h *= sigmoid(raw * slope + bias)
                d_weight += _total(h * raw)
                d_bias += _total(h)
        if (ALL_NEGATIVES or HARD_NEGATIVES) and not HAS_HADAMARD:
            g += slope * h
        _store(out, g, tl.load(row_grad + DIAGONAL_STUDENT * n), positive, factors, 0, stored, SCALED, INTERPRETED)
        if HAS_HADAMARD:
            raw = product(
                image, text, plane_weight, safe_row, safe_column, width, EVEN, True, PRECISION, INTERPRETED, BLOCK_K
            )  # fmt: skip
            h *= sigmoid(raw + bias)
            d_bias += _total(h)
            _store(
                out + matrix_stride, h, tl.load(row_grad + DIAGONAL_HADAMARD * n), positive, factors, 1, stored, SCALED,
                INTERPRETED,
            )  # fmt: skip

    sums += program * 4
    if HAS_STUDENT:
        tl.store(sums, tl.load(sums) + d_scale)
    if HAS_IMAGE_TO_TEACHER or HAS_TEACHER_TO_TEXT:
        tl.store(sums + 1, tl.load(sums + 1) + d_cross)
    if ALL_NEGATIVES or HARD_NEGATIVES:
        tl.store(sums + 2, tl.load(sums + 2) + d_weight)
        tl.store(sums + 3, tl.load(sums + 3) + d_bias)
