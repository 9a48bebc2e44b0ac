"""Backward kernel of similarity_loss: gradients of a chunk of each of the student's matrices, which are computed again."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LOG2E, narrowed
from simplclip.kernels.similarity.merge import LSE_CROSS, LSE_STUDENT, LSE_TEACHER, MEAN_CROSS, MEAN_STUDENT
from simplclip.kernels.similarity.tile import (
    ids_of_rows,
    negatives,
    product,
    sigmoid_logits,
    sigmoid_pairs,
    sigmoid_slopes,
    weights,
)
from simplclip.ops.similarity.call import RowStat

SUMS = 6  # d_scale, d_cross_scale, d_sigmoid_weight and d_sigmoid_bias of each term
_SUMS: tl.constexpr = tl.constexpr(SUMS)
SIGMOID: tl.constexpr = tl.constexpr(int(RowStat.SIGMOID))
DIAGONAL_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_STUDENT))
DIAGONAL_IMAGE_TO_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_IMAGE_TO_TEACHER))
DIAGONAL_TEACHER_TO_TEXT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_TEACHER_TO_TEXT))


@triton.jit
def _softmax(logits, stats, LSE: tl.constexpr, size, AXIS: tl.constexpr):
    """The softmax along an axis by its log-sum-exps; without negatives those are -inf, as are all logits."""
    lse = tl.load(stats + LSE * size)
    return weights(logits, tl.expand_dims(tl.where(lse == -INF, 0.0, lse * LOG2E), AXIS))


@triton.jit
def _total(tile):  # [BLOCK_M, BLOCK_N]
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _store(
    out, matrix_stride, MATRIX: tl.constexpr, value, diagonal, positive, factor, stored, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Stores the gradient of a matrix, `diagonal` that of the positives, times the factor if there is one."""
    value = tl.where(positive, diagonal, value)
    if factor is not None:
        value *= tl.load(factor)
    tl.store(out + MATRIX * matrix_stride, narrowed(value, out.dtype.element_ty, INTERPRETED), stored)


@triton.jit(do_not_specialize=["n", "m", "label_offset", "first_row", "first_column", "row_blocks"])
def _similarity_gradient_kernel(
    image,  # [N, D]
    text,  # [M, D]
    teacher_image,  # [N, D̂], None where T, U and V are not computed; likewise the other tensors
    teacher_text,  # [M, D̂]
    projected_image,  # [N, D̂]
    projected_text,  # [M, D̂]
    scale,  # []
    teacher_scale,  # []
    cross_scale,  # []
    sigmoids,  # tile.Sigmoids
    pairs,  # tile.Pairs
    rows,  # [11, N] statistics
    columns,  # [5, M]
    grad_rows,  # [11, N]
    grad_columns,  # [5, M]
    factor,  # [] or None: the factor of the matrices before they are rounded
    out,  # [matrices, rows, out_stride]: a block of G of this launch's matrices, in the order of launch.STUDENTS
    sums,  # [programs, SUMS]
    n,
    m,
    width,
    teacher_width,
    label_offset,
    first_row,  # of the block, as is first_column
    first_column,
    row_blocks,
    out_stride,
    matrix_stride,
    LAUNCH: tl.constexpr,  # launch.Launch
    TILE: tl.constexpr,  # launch.Tiling
    ATTEND: tl.constexpr,  # only with Z: store the gradient of the logits, which is the softmax, not that of the similarities
):
    """One tile: writes G of each of the student's matrices, and adds to this program's sums of the scalars' gradients."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    program = tl.program_id(0)
    at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + at
    row_inside = row < n
    safe_row = tl.minimum(row, n - 1).to(tl.int64)
    column_at = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_column + column_at
    safe_column = tl.minimum(column, m - 1).to(tl.int64)

    row_stat = rows + safe_row
    column_stat = columns + safe_column
    row_grad = grad_rows + safe_row
    column_grad = grad_columns + safe_column
    positive = column[None, :] == row[:, None] + label_offset
    stored = row_inside[:, None] & (column < m)[None, :]
    out += at.to(tl.int64)[:, None] * out_stride + column_at[None, :]
    matrix_stride = tl.cast(matrix_stride, tl.int64)
    u_at: tl.constexpr = 1 if LAUNCH.HAS_STUDENT else 0  # in `out`
    d_scale, d_cross = 0.0, 0.0
    t = None

    row_ids = ids_of_rows(pairs, safe_row)

    if LAUNCH.HAS_TEACHER:
        raw = product(teacher_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        negative = negatives(None, row, column, row_inside, m, label_offset, row_ids, pairs, safe_column, LAUNCH.DROP_IDS)
        t = tl.where(negative, raw * (tl.load(teacher_scale) * LOG2E), -INF)

    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        raw = product(projected_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        u_scale = tl.load(cross_scale)
        u = tl.where(t != -INF, raw * (u_scale * LOG2E), -INF)
        g = tl.load(row_grad + LSE_CROSS * n)[:, None] * _softmax(u, row_stat, LSE_CROSS, n, 1)
        g -= tl.load(row_grad + MEAN_CROSS * n)[:, None] * _softmax(t, row_stat, LSE_TEACHER, n, 1)
        d_cross += _total(g * raw)
        diagonal = tl.load(row_grad + DIAGONAL_IMAGE_TO_TEACHER * n)[:, None]
        _store(out, matrix_stride, u_at, g * u_scale, diagonal, positive, factor, stored, TILE.INTERPRETED)

    if LAUNCH.HAS_TEACHER_TO_TEXT:
        raw = product(teacher_image, projected_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        u_scale = tl.load(cross_scale)
        v = tl.where(t != -INF, raw * (u_scale * LOG2E), -INF)
        g = tl.load(column_grad + LSE_CROSS * m)[None, :] * _softmax(v, column_stat, LSE_CROSS, m, 0)
        g -= tl.load(column_grad + MEAN_CROSS * m)[None, :] * _softmax(t, column_stat, LSE_TEACHER, m, 0)
        d_cross += _total(g * raw)
        diagonal = tl.load(row_grad + DIAGONAL_TEACHER_TO_TEXT * n)[:, None]
        _store(out, matrix_stride, u_at + 1, g * u_scale, diagonal, positive, factor, stored, TILE.INTERPRETED)

    if LAUNCH.HAS_STUDENT:
        raw = product(image, text, safe_row, safe_column, width, TILE.EVEN, TILE)
        negative = negatives(t, row, column, row_inside, m, label_offset, row_ids, pairs, safe_column, LAUNCH.DROP_IDS)
        z_scale = tl.load(scale)
        z = tl.where(negative, raw * (z_scale * LOG2E), -INF)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if LAUNCH.RELATIONAL:
            g -= tl.load(row_grad + MEAN_STUDENT * n)[:, None] * _softmax(t, row_stat, LSE_TEACHER, n, 1)
            if LAUNCH.COLUMNS:
                g -= tl.load(column_grad + MEAN_STUDENT * m)[None, :] * _softmax(t, column_stat, LSE_TEACHER, m, 0)
        p = _softmax(z, row_stat, LSE_STUDENT, n, 1)
        g += tl.load(row_grad + LSE_STUDENT * n)[:, None] * p
        if LAUNCH.COLUMNS:
            p = _softmax(z, column_stat, LSE_STUDENT, m, 0)
            g += tl.load(column_grad + LSE_STUDENT * m)[None, :] * p
        d_scale += _total(g * raw)
        if not ATTEND:
            g *= z_scale
        if LAUNCH.SIGMOIDS > 0:
            negative, matching = sigmoid_pairs(row, column, stored, label_offset, pairs, safe_row, safe_column)
            SIGMOIDS: tl.constexpr = LAUNCH.SIGMOIDS
            for k in tl.static_range(SIGMOIDS):
                signed, amount, matched = sigmoid_logits(raw, sigmoids, pairs, safe_row, safe_column, negative, matching, k)
                slope = sigmoid_slopes(signed, amount, matched) * tl.load(row_grad + (SIGMOID + k) * n)[:, None]
                at_sums = sums + program * _SUMS + 2 + 2 * k
                tl.store(at_sums, tl.load(at_sums) + _total(slope * raw))
                tl.store(at_sums + 1, tl.load(at_sums + 1) + _total(slope))
                g += slope * tl.load(sigmoids.weight + k)
        diagonal = tl.load(row_grad + DIAGONAL_STUDENT * n)[:, None]
        if LAUNCH.SIGMOIDS > 0:
            diagonal += g  # which is that of the sigmoid terms there
        _store(out, matrix_stride, 0, g, diagonal, positive, factor, stored, TILE.INTERPRETED)

    sums += program * _SUMS
    if LAUNCH.HAS_STUDENT:
        tl.store(sums, tl.load(sums) + d_scale)
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        tl.store(sums + 1, tl.load(sums + 1) + d_cross)
