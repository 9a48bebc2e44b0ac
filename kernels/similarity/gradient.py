"""Kernels of similarity_loss's backward: the gradient G of the similarities, a block at a time, and
the range of G in float16.
"""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, block_of_program
from simplclip.kernels.similarity.rows import (
    DIAGONAL_STUDENT,
    LSE_STUDENT,
    LSE_TEACHER,
    MEAN,
    MIX,
    NEGATIVE,
    PAIR_MATCHING,
    POSITIVE,
    WEIGHT,
    sigmoid_number,
)
from simplclip.kernels.similarity.tile import (
    exp,
    finite,
    is_negative,
    load_clamped,
    product,
    softplus_and_sigmoid,
)

SUMS = 3  # d_scale, d_plane
# log2 of the largest scaled entry: far from overflow, 2^24 times the least normal
PEAK: tl.constexpr = tl.constexpr(10.0)
# of kernels that compute a block of G
SIZES = ["n", "m", "label_offset", "first_row", "first_column", "row_blocks", "column_blocks"]


@triton.jit
def _gradient_of_logits(
    logits,  # [BLOCK_M, BLOCK_N]
    stats,  # [6, size] RowStat or [3, size] ColumnStat
    grads,  # likewise
    LSE: tl.constexpr,  # the statistic with the log-sum-exps
    GRAD: tl.constexpr,  # the statistic whose gradient is passed on
    index,  # [BLOCK_M] or [BLOCK_N], the tile's rows or columns
    size,
    AXIS: tl.constexpr,
):  # [BLOCK_M, BLOCK_N]
    """Returns softmax(logits) along AXIS times the gradient of each row's or column's statistic.

    logits: -inf where there is no negative.
    """
    shift = finite(load_clamped(stats + LSE * size, index, size))
    grad = load_clamped(grads + GRAD * size, index, size)
    return tl.expand_dims(grad, AXIS) * exp(logits - tl.expand_dims(shift, AXIS))


@triton.jit
def store_gradient(
    out,  # [rows, out_stride], a block of G
    g,  # [BLOCK_M, BLOCK_N]
    factor,  # [] or None
    row,  # [BLOCK_M], in the block of G, as is column
    column,  # [BLOCK_N]
    height,  # rows of the block that are in the matrix
    out_stride,  # a multiple of 16
):
    """Stores a tile g to a block of G, in its dtype, multiplied by the factor if there is one.

    It stores also what lies between the last column and the pitch, which nobody reads: a mask that
    ends at a multiple of 16 lets a thread store 16 bytes at a time.
    """
    if factor is not None:
        g *= tl.load(factor)
    out += row.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = (row < height)[:, None] & (column < out_stride)[None, :]
    tl.store(out, g.to(out.dtype.element_ty), inside)


@triton.jit
def add_to_sum(sums, tile):
    """Adds the sum of a tile to the number that the pointer `sums` points to."""
    tl.store(sums, tl.load(sums) + tl.sum(tile))


@triton.jit(do_not_specialize=SIZES)
def _similarity_gradient_kernel(
    image,  # [N, D]
    text,  # [M, D]
    scale,  # []
    teacher_image,  # [N, D̂], None without a teacher, likewise the next two
    teacher_text,  # [M, D̂]
    teacher_scale,  # []
    plane,  # [2] or None
    ids,  # [N] or None
    text_ids,  # [M] or None
    rows,  # [6, N] statistics
    columns,  # [3, M], None without statistics of columns, likewise grad_columns
    grad_rows,  # [6, N]
    grad_columns,  # [3, M]
    factor,  # [] or None: the factor of G before it is rounded
    out,  # [rows, out_stride], a block of G
    sums,  # [programs, SUMS]
    n,
    m,
    width,
    teacher_width,
    label_offset,
    first_row,  # of the block, as is first_column
    first_column,
    row_blocks,
    column_blocks,
    out_stride,
    TILE: tl.constexpr,  # tuning.Tiling
):
    """Writes a tile of G, the gradient of the similarities; adds to this program's sums.

    The sums are the gradients of scale and of plane's p and q.
    """
    row_block, column_block = block_of_program(row_blocks, column_blocks, TILE.BLOCK_M)
    row_of_block = row_block * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    column_of_block = column_block * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
    row = first_row + row_of_block
    column = first_column + column_of_block
    sums += tl.program_id(0) * 3  # SUMS

    t = None
    if teacher_image is not None:
        t = product(teacher_image, teacher_text, row, column, n, m, teacher_width, TILE)
        t *= tl.load(teacher_scale)
        t = tl.where(is_negative(None, row, column, n, m, label_offset, ids, text_ids), t, -INF)
    similarity = product(image, text, row, column, n, m, width, TILE)
    negative = is_negative(t, row, column, n, m, label_offset, ids, text_ids)
    z = tl.where(negative, similarity * tl.load(scale), -INF)
    g = _gradient_of_logits(z, rows, grad_rows, LSE_STUDENT, LSE_STUDENT, row, n, 1)
    if columns is not None:
        g += _gradient_of_logits(z, columns, grad_columns, LSE_STUDENT, LSE_STUDENT, column, m, 0)
    if teacher_image is not None:
        g -= _gradient_of_logits(t, rows, grad_rows, LSE_TEACHER, MEAN, row, n, 1)
        if columns is not None:
            g -= _gradient_of_logits(t, columns, grad_columns, LSE_TEACHER, MEAN, column, m, 0)
    add_to_sum(sums, g * similarity)
    g *= tl.load(scale)
    if plane is not None:
        _, slope = softplus_and_sigmoid(similarity * tl.load(plane) + tl.load(plane + 1))
        grad = load_clamped(grad_rows + PAIR_MATCHING * n, row, n)
        slope = tl.where(negative, slope * grad[:, None], 0.0)
        add_to_sum(sums + 1, slope * similarity)
        add_to_sum(sums + 2, slope)
        g += slope * tl.load(plane)
    positive = column[None, :] == row[:, None] + label_offset
    g = tl.where(positive, load_clamped(grad_rows + DIAGONAL_STUDENT * n, row, n)[:, None], g)
    store_gradient(out, g, factor, row_of_block, column_of_block, n - first_row, out_stride)


@triton.jit
def _largest(
    values,  # [6, size] or [3, size]
    STAT: tl.constexpr,
    size,
    BLOCK: tl.constexpr,
):
    """Returns the largest absolute value in the row STAT of values."""
    values += STAT * size.to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(values + index, index < size, 0.0)))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["n", "m"])
def _similarity_range_kernel(
    scale,  # [], None for similarity_sigmoid, likewise the next three
    plane,  # [2] or None
    grad_rows,  # [6, N]
    grad_columns,  # [3, M], None also without statistics of columns
    sigmoids,  # [5, TERMS] of similarity_sigmoid
    out,  # [2]
    n,
    m,
    HAS_TEACHER: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the power of two that brings a bound of all entries of G near 2^PEAK, and its inverse.

    G: the gradient of the similarities. One program.
    """
    bound = 0.0
    if grad_rows is not None:
        bound += _largest(grad_rows, LSE_STUDENT, n, BLOCK)
        if grad_columns is not None:
            bound += _largest(grad_columns, LSE_STUDENT, m, BLOCK)
        if HAS_TEACHER:
            bound += _largest(grad_rows, MEAN, n, BLOCK)
            if grad_columns is not None:
                bound += _largest(grad_columns, MEAN, m, BLOCK)
        bound *= tl.abs(tl.load(scale))
        if plane is not None:
            bound += tl.abs(tl.load(plane)) * _largest(grad_rows, PAIR_MATCHING, n, BLOCK)
        bound = tl.maximum(bound, _largest(grad_rows, DIAGONAL_STUDENT, n, BLOCK))
    for k in tl.static_range(TERMS):
        factor = sigmoid_number(sigmoids, WEIGHT, k, TERMS)
        factor *= sigmoid_number(sigmoids, MIX, k, TERMS)
        negative = sigmoid_number(sigmoids, NEGATIVE, k, TERMS)
        positive = sigmoid_number(sigmoids, POSITIVE, k, TERMS)
        bound += tl.abs(factor) * tl.maximum(tl.abs(negative), tl.abs(positive))
    power = tl.minimum(tl.maximum(PEAK - tl.ceil(tl.log2(bound)), -100.0), 100.0)
    tl.store(out, tl.exp2(power))
    tl.store(out + 1, tl.exp2(-power))
