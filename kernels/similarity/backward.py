"""Backward kernel of similarity_loss: the gradients to a chunk of each student plane, from the products multiplied again."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LOG2E, narrowed, sigmoid
from simplclip.kernels.similarity.merge import (
    DIAGONAL_L,
    DIAGONAL_U,
    DIAGONAL_V,
    DIAGONAL_Z,
    LSE_T,
    LSE_X,
    LSE_Z,
    MATCH,
    MEAN_X,
    MEAN_Z,
)
from simplclip.kernels.similarity.tile import negatives, product, weights

SUMS = 4  # d_scale, d_cross_scale, d_plane_weight (scalar), d_plane_bias


@triton.jit
def _base(lse):
    """A log-sum-exp in base 2; 0 for that of no negatives, whose logits are all -inf."""
    return tl.where(lse == -INF, 0.0, lse * LOG2E)


@triton.jit
def _total(tile):  # [BLOCK_M, BLOCK_N]
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _store(
    out, value, diagonal, positive, factors, PLANE: tl.constexpr, stored, SCALED: tl.constexpr, INTERPRETED: tl.constexpr
):
    value = tl.where(positive, diagonal[:, None], value)
    if SCALED:
        value *= tl.load(factors + PLANE)
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
    factors,  # [planes], only if SCALED: what a plane is multiplied by before it is rounded
    out,  # [planes, chunk, out_stride]: Z, L, U, V as far as they are in the launch
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
    plane_stride,
    Z: tl.constexpr,
    L: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    V: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALL: tl.constexpr,
    HARD: tl.constexpr,
    RELATIONAL: tl.constexpr,
    KL: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
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
    """One tile: G of every student plane, and its share of the scalars' gradients added to this program's sums."""
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
    plane_stride = tl.cast(plane_stride, tl.int64)
    d_scale, d_cross, d_weight, d_bias = 0.0, 0.0, 0.0, 0.0

    row_ids = row
    if IDS:
        row_ids = tl.load(ids + safe_row)

    if T:
        raw = product(
            teacher_image, teacher_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, IDS)
        t = tl.where(negative, raw * (tl.load(teacher_scale) * LOG2E), -INF)

    if U:
        raw = product(
            projected_image, teacher_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        if T:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, IDS)
        x_scale = tl.load(cross_scale)
        u = tl.where(negative, raw * (x_scale * LOG2E), -INF)
        g = tl.load(row_grad + LSE_X * n)[:, None] * weights(u, _base(tl.load(row_stat + LSE_X * n))[:, None])
        if KL:
            g -= tl.load(row_grad + MEAN_X * n)[:, None] * weights(t, _base(tl.load(row_stat + LSE_T * n))[:, None])
        d_cross += _total(g * raw)
        u_plane: tl.constexpr = Z + L
        diagonal = tl.load(row_grad + DIAGONAL_U * n)
        if not ATTEND:
            g *= x_scale
        _store(out + u_plane * plane_stride, g, diagonal, positive, factors, u_plane, stored, SCALED, INTERPRETED)

    if V:
        raw = product(
            teacher_image, projected_text, None, safe_row, safe_column, teacher_width,
            TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
        )  # fmt: skip
        if T:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, IDS)
        x_scale = tl.load(cross_scale)
        v = tl.where(negative, raw * (x_scale * LOG2E), -INF)
        g = tl.load(column_grad + LSE_X * m)[None, :] * weights(v, _base(tl.load(column_stat + LSE_X * m))[None, :])
        if KL:
            g -= tl.load(column_grad + MEAN_X * m)[None, :] * weights(t, _base(tl.load(column_stat + LSE_T * m))[None, :])
        d_cross += _total(g * raw)
        v_plane: tl.constexpr = Z + L + U
        diagonal = tl.load(row_grad + DIAGONAL_V * n)
        _store(out + v_plane * plane_stride, g * x_scale, diagonal, positive, factors, v_plane, stored, SCALED, INTERPRETED)

    if Z:
        raw = product(
            image, text, None, safe_row, safe_column, width, EVEN, False, PRECISION, INTERPRETED, BLOCK_K
        )  # fmt: skip
        if T:
            negative = t != -INF
        else:
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, IDS)
        z_scale = tl.load(scale)
        z = tl.where(negative, raw * (z_scale * LOG2E), -INF)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        h = g
        if RELATIONAL:
            g -= tl.load(row_grad + MEAN_Z * n)[:, None] * weights(t, _base(tl.load(row_stat + LSE_T * n))[:, None])
            if COLUMNS:
                base = _base(tl.load(column_stat + LSE_T * m))
                g -= tl.load(column_grad + MEAN_Z * m)[None, :] * weights(t, base[None, :])
        if SOFTMAX:
            p = weights(z, _base(tl.load(row_stat + LSE_Z * n))[:, None])
            g += tl.load(row_grad + LSE_Z * n)[:, None] * p
            if HARD:
                h += tl.load(row_grad + MATCH * n)[:, None] * p
            if COLUMNS:
                p = weights(z, _base(tl.load(column_stat + LSE_Z * m))[None, :])
                g += tl.load(column_grad + LSE_Z * m)[None, :] * p
                if HARD:
                    h += tl.load(column_grad + MATCH * m)[None, :] * p
        d_scale += _total(g * raw)
        g *= z_scale
        if ALL:
            h = tl.where(z != -INF, tl.load(row_grad + MATCH * n)[:, None], 0.0)
        if ALL or HARD:
            bias = tl.load(plane_bias)
            if not L:
                slope = tl.load(plane_weight)
                h *= sigmoid(raw * slope + bias)
                d_weight += _total(h * raw)
                d_bias += _total(h)
        if (ALL or HARD) and not L:
            g += slope * h
        _store(out, g, tl.load(row_grad + DIAGONAL_Z * n), positive, factors, 0, stored, SCALED, INTERPRETED)
        if L:
            raw = product(
                image, text, plane_weight, safe_row, safe_column, width, EVEN, True, PRECISION, INTERPRETED, BLOCK_K
            )  # fmt: skip
            h *= sigmoid(raw + bias)
            d_bias += _total(h)
            _store(
                out + plane_stride, h, tl.load(row_grad + DIAGONAL_L * n), positive, factors, 1, stored, SCALED, INTERPRETED
            )

    sums += program * 4
    if Z:
        tl.store(sums, tl.load(sums) + d_scale)
    if U or V:
        tl.store(sums + 1, tl.load(sums + 1) + d_cross)
    if ALL or HARD:
        tl.store(sums + 2, tl.load(sums + 2) + d_weight)
        tl.store(sums + 3, tl.load(sums + 3) + d_bias)
