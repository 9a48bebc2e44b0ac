"""Kernels of similarity_loss's forward: statistics of the rows and columns of tiles, their merge,
and the similarities of the positives.
"""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, block_of_program
from simplclip.kernels.similarity.rows import LSE_STUDENT, LSE_TEACHER, MEAN, PAIR_MATCHING
from simplclip.kernels.similarity.tile import (
    exp,
    finite,
    is_negative,
    online_max,
    product,
    softplus_and_sigmoid,
    times_nonzero,
)

# Slots of the parts: maximum and sum of e^(logit - maximum), for the teacher also the sum with
# these weights that gives the mean. Columns have the same slots without the last one, and without a
# teacher only the student's.
STUDENT: tl.constexpr = tl.constexpr(0)
TEACHER: tl.constexpr = tl.constexpr(2)
UNMATCHED: tl.constexpr = tl.constexpr(5)


@triton.jit
def _store_column_softmax(
    logits,  # [BLOCK_M, BLOCK_N]
    part,  # [BLOCK_N], pointers to the columns' maxima, before their sums
    m,
    inside,  # [BLOCK_N]
):
    """Stores the columns' maxima, and sums of e^(logit - maximum); returns these powers."""
    maximum = tl.max(logits, 0)
    weight = exp(logits - finite(maximum)[None, :])
    tl.store(part, maximum, inside)
    tl.store(part + m, tl.sum(weight, 0), inside)
    return weight


_SIZES = ["n", "m", "label_offset", "first_row", "row_count", "row_blocks"]


@triton.jit(do_not_specialize=[*_SIZES, "splits", "tiles_per_split"])
def _similarity_statistics_kernel(
    image,  # [N, D]
    text,  # [M, D]
    scale,  # []
    teacher_image,  # [N, D̂], None without a teacher, likewise the next two
    teacher_text,  # [M, D̂]
    teacher_scale,  # []
    plane,  # [2] or None
    ids,  # [N] or None
    text_ids,  # [M] or None
    row_parts,  # [splits, ROW_SLOTS, row_count]
    column_parts,  # [row_blocks, COLUMN_SLOTS, M], None without statistics of columns
    n,
    m,
    width,
    teacher_width,
    label_offset,
    entropy,
    first_row,
    row_count,
    row_blocks,
    splits,
    tiles_per_split,
    ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr,
    TILE: tl.constexpr,  # tuning.Tiling
):
    """Writes parts of statistics: of BLOCK_M rows over a range of columns, of these over the rows.

    The teacher's logits are computed first and kept, since the means need them: at most two tiles
    are in registers.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    row_block, split = block_of_program(row_blocks, splits, BLOCK_M)
    row_of_part = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + row_of_part

    max_z = tl.full((BLOCK_M,), -INF, tl.float32)
    max_t = max_z
    sum_z = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = sum_z
    mean = sum_z
    unmatched = sum_z
    z_scale = tl.load(scale)
    if teacher_image is not None:
        t_scale = tl.load(teacher_scale)

    tiles = (m + BLOCK_N - 1) // BLOCK_N
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < m
        if column_parts is not None:
            part = column_parts + row_block.to(tl.int64) * COLUMN_SLOTS * m + column

        t = None
        if teacher_image is not None:
            t = product(teacher_image, teacher_text, row, column, n, m, teacher_width, TILE)
            t *= t_scale
            t += 0.0 * t  # NaN for an infinite logit, since -inf means that there is no negative
            t = tl.where(is_negative(None, row, column, n, m, label_offset, ids, text_ids), t, -INF)

        similarity = product(image, text, row, column, n, m, width, TILE)
        negative = is_negative(t, row, column, n, m, label_offset, ids, text_ids)
        z = tl.where(negative, similarity * z_scale, -INF)
        if plane is not None:
            softplus, _ = softplus_and_sigmoid(similarity * tl.load(plane) + tl.load(plane + 1))
            unmatched += tl.sum(tl.where(negative, softplus, 0.0), 1)
        if teacher_image is not None:
            gap = entropy * t - z
            max_t, shift, shrink = online_max(max_t, t, 1)
            weight = exp(t - shift[:, None])
            sum_t = sum_t * shrink + tl.sum(weight, 1)
            mean = mean * shrink + tl.sum(times_nonzero(weight, gap), 1)
            if column_parts is not None:
                weight = _store_column_softmax(t, part + TEACHER * m, m, inside)
                tl.store(part + (TEACHER + 2) * m, tl.sum(times_nonzero(weight, gap), 0), inside)
        max_z, shift, shrink = online_max(max_z, z, 1)
        sum_z = sum_z * shrink + tl.sum(exp(z - shift[:, None]), 1)
        if column_parts is not None:
            _store_column_softmax(z, part + STUDENT * m, m, inside)

    part = row_parts + split.to(tl.int64) * ROW_SLOTS * row_count + row_of_part
    inside = row_of_part < row_count
    tl.store(part + STUDENT * row_count, max_z, inside)
    tl.store(part + (STUDENT + 1) * row_count, sum_z, inside)
    if teacher_image is not None:
        tl.store(part + TEACHER * row_count, max_t, inside)
        tl.store(part + (TEACHER + 1) * row_count, sum_t, inside)
        tl.store(part + (TEACHER + 2) * row_count, mean, inside)
    if plane is not None:
        tl.store(part + UNMATCHED * row_count, unmatched, inside)


@triton.jit
def _merge_softmax(
    parts,  # [BLOCK], pointers to the maxima of the first part
    part_count,
    part_stride,
    size,
    inside,  # [BLOCK]
    out,  # [BLOCK], pointers to row 0
    out_stride,
    LSE: tl.constexpr,  # row of the log-sum-exp
    MEAN: tl.constexpr,  # row of the mean, None without one
    PREVIOUS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Writes the log-sum-exps, and the means, of BLOCK rows or columns, merged from all parts.

    PREVIOUS: merges with what `out` holds.
    """
    maximum = tl.full(inside.shape, -INF, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    mean = total
    if PREVIOUS:
        maximum = tl.load(out + LSE * out_stride, inside, -INF)
        total = tl.where(maximum == -INF, 0.0, 1.0)
        if MEAN is not None:
            mean = tl.load(out + MEAN * out_stride, inside, 0.0)
    for start in range(0, part_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        exists = (part < part_count)[:, None] & inside[None, :]
        block = parts[None, :] + part.to(tl.int64)[:, None] * part_stride
        part_maximum = tl.load(block, exists, -INF)
        maximum, shift, shrink = online_max(maximum, part_maximum, 0)
        weight = exp(part_maximum - shift[None, :])
        total = total * shrink + tl.sum(weight * tl.load(block + size, exists, 0.0), 0)
        if MEAN is not None:
            mean = mean * shrink + tl.sum(weight * tl.load(block + 2 * size, exists, 0.0), 0)
    tl.store(out + LSE * out_stride, maximum + tl.log2(total) * LN2, inside)
    if MEAN is not None:
        tl.store(out + MEAN * out_stride, tl.where(total == 0.0, 0.0, mean / total), inside)


@triton.jit(do_not_specialize=["size", "part_count", "out_stride", "out_first"])
def _similarity_merge_kernel(
    parts,  # [part_count, SLOTS, size]
    out,  # [6, N] or [3, M]
    size,
    part_count,
    out_stride,
    out_first,
    SLOTS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_PLANE: tl.constexpr,
    PREVIOUS: tl.constexpr,  # whether `out` holds statistics of columns over earlier rows
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the parts of BLOCK rows' or columns' statistics; writes them to `out`.

    out_first: the first column of `out`. The order of sums depends only on the number of parts.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    out += out_first + index
    parts += index
    stride = size.to(tl.int64) * SLOTS
    _merge_softmax(
        parts + STUDENT * size, part_count, stride, size, inside, out, out_stride,
        LSE_STUDENT, None, PREVIOUS, BLOCK_PARTS,
    )  # fmt: skip
    teacher = parts + TEACHER * size
    if HAS_TEACHER:
        _merge_softmax(
            teacher, part_count, stride, size, inside, out, out_stride,
            LSE_TEACHER, MEAN, PREVIOUS, BLOCK_PARTS,
        )  # fmt: skip
    if HAS_PLANE:
        total = tl.zeros((BLOCK,), tl.float32)
        parts += UNMATCHED * size
        for _ in range(part_count):
            total += tl.load(parts, inside, 0.0)
            parts += stride
        tl.store(out + PAIR_MATCHING * out_stride, total, inside)


@triton.jit(do_not_specialize=["stat", "n", "label_offset"])
def _similarity_diagonal_kernel(
    image,  # [N, width]
    text,  # [M, width]
    rows,  # [6, N]
    stat,  # the row to write
    n,
    width,
    label_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the similarities of BLOCK_M rows' positives, in float32, to the row `stat` of rows.

    So the tiles of the large products need not look for them.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_row = tl.minimum(row, n - 1).to(tl.int64)
    # Sums of products are added, not products: with these a fused multiply-add rounds the same sum
    # differently in two lanes.
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = (depth < width)[None, :]
        a = tl.load(image + safe_row[:, None] * width + depth[None, :], inside, 0.0)
        column = safe_row + label_offset
        b = tl.load(text + column[:, None] * width + depth[None, :], inside, 0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(rows + stat * n + row, tl.sum(total, 1), row < n)
