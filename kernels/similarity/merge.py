"""Small kernels of similarity_loss's forward: merging partial statistics, the positives, the number of negatives."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, LOG2E
from simplclip.kernels.similarity.tile import raised, weights
from simplclip.ops.similarity.call import RowStat

# A row of the result of the merge; columns have the same numbers (LSE_V is LSE_U's, MEAN_V is MEAN_U's).
LSE_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.LSE_STUDENT))
LSE_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.LSE_TEACHER))
LSE_CROSS: tl.constexpr = tl.constexpr(int(RowStat.LSE_IMAGE_TO_TEACHER))
PAIR_MATCHING: tl.constexpr = tl.constexpr(int(RowStat.PAIR_MATCHING))
MEAN_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.MEAN_STUDENT))
MEAN_CROSS: tl.constexpr = tl.constexpr(int(RowStat.MEAN_IMAGE_TO_TEACHER))
NEGATIVES: tl.constexpr = tl.constexpr(int(RowStat.NEGATIVES))
DIAGONAL_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_STUDENT))
DIAGONAL_HADAMARD: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_HADAMARD))
DIAGONAL_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_TEACHER))
DIAGONAL_IMAGE_TO_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_IMAGE_TO_TEACHER))
DIAGONAL_TEACHER_TO_TEXT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_TEACHER_TO_TEXT))


@triton.jit
def _merge_softmax(
    parts,  # [parts, slots, size], at the maxima
    part_stride,
    parts_count,
    size,
    inside,  # [BLOCK]
    out,  # at row 0
    out_stride,
    LSE: tl.constexpr,
    FIRST: tl.constexpr,  # the rows of the result for the weighted means, -1 where there are none
    SECOND: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    maximum = tl.full(inside.shape, -INF, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    first, second = total, total
    if PREVIOUS:
        maximum = tl.load(out + LSE * out_stride, inside, -INF) * LOG2E
        total = tl.where(maximum == -INF, 0.0, 1.0)
        if FIRST >= 0:
            first = tl.load(out + FIRST * out_stride, inside, 0.0)
        if SECOND >= 0:
            second = tl.load(out + SECOND * out_stride, inside, 0.0)
    for start in range(0, parts_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part < parts_count)[:, None] & inside[None, :]
        at = parts[None, :] + part.to(tl.int64)[:, None] * part_stride
        part_maximum = tl.load(at, there, -INF)
        maximum, base, shrink = raised(maximum, part_maximum, 0)
        share = weights(part_maximum, base[None, :])
        total = total * shrink + tl.sum(share * tl.load(at + size, there, 0.0), 0)
        if FIRST >= 0:
            first = first * shrink + tl.sum(share * tl.load(at + 2 * size, there, 0.0), 0)
        if SECOND >= 0:
            slot: tl.constexpr = 3 if FIRST >= 0 else 2
            second = second * shrink + tl.sum(share * tl.load(at + slot * size, there, 0.0), 0)
    tl.store(out + LSE * out_stride, (maximum + tl.log2(total)) * LN2, inside)
    if FIRST >= 0:
        tl.store(out + FIRST * out_stride, tl.where(total == 0.0, 0.0, first / total), inside)
    if SECOND >= 0:
        tl.store(out + SECOND * out_stride, tl.where(total == 0.0, 0.0, second / total), inside)


@triton.jit
def _merge_sum(parts, part_stride, parts_count, inside, out, BLOCK_PARTS: tl.constexpr):
    total = tl.zeros(inside.shape, tl.float32)
    for start in range(0, parts_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part < parts_count)[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts[None, :] + part.to(tl.int64)[:, None] * part_stride, there, 0.0), 0)
    tl.store(out, total, inside)


@triton.jit(do_not_specialize=["size", "parts_count", "out_stride", "out_first"])
def _similarity_merge_kernel(
    parts,  # [parts_count, SLOTS, size]
    out,  # [12, N] or [6, M]: RowStat's first six rows are ColumnStat's
    size,
    parts_count,
    out_stride,
    out_first,
    HAS_TEACHER: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALL_NEGATIVES: tl.constexpr,
    HARD_NEGATIVES: tl.constexpr,
    RELATIONAL: tl.constexpr,
    KL: tl.constexpr,
    TEACHER_AT: tl.constexpr,
    CROSS_AT: tl.constexpr,
    STUDENT_AT: tl.constexpr,
    PAIR_MATCHING_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    PREVIOUS: tl.constexpr,  # fold in what out holds: the statistics over earlier rows
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the statistics of the parts, in an order that depends only on their number."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    out += out_first + at
    parts += at
    part_stride = size.to(tl.int64) * SLOTS
    if HAS_TEACHER:
        _merge_softmax(
            parts + TEACHER_AT * size, part_stride, parts_count, size, inside, out, out_stride,
            LSE_TEACHER, MEAN_STUDENT if RELATIONAL else -1, MEAN_CROSS if KL else -1, PREVIOUS, BLOCK_PARTS,
        )  # fmt: skip
    if HAS_CROSS:
        _merge_softmax(
            parts + CROSS_AT * size, part_stride, parts_count, size, inside, out, out_stride, LSE_CROSS, -1, -1, PREVIOUS,
            BLOCK_PARTS,
        )  # fmt: skip
    if SOFTMAX:
        _merge_softmax(
            parts + STUDENT_AT * size, part_stride, parts_count, size, inside, out, out_stride,
            LSE_STUDENT, PAIR_MATCHING if HARD_NEGATIVES else -1, -1, PREVIOUS, BLOCK_PARTS,
        )  # fmt: skip
    if ALL_NEGATIVES:
        _merge_sum(
            parts + PAIR_MATCHING_AT * size, part_stride, parts_count, inside, out + PAIR_MATCHING * out_stride, BLOCK_PARTS
        )


@triton.jit
def _dots(left, right, weight, rows, columns, width, WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tl.zeros(rows.shape, tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = (depth < width)[None, :]
        a = tl.load(left + rows[:, None] * width + depth[None, :], inside, 0.0).to(tl.float32)
        b = tl.load(right + columns[:, None] * width + depth[None, :], inside, 0.0).to(tl.float32)
        if WEIGHTED:
            a *= tl.load(weight + depth, depth < width, 0.0)[None, :]
        total += tl.sum(a * b, 1)
    return total


@triton.jit(do_not_specialize=["n", "label_offset"])
def _similarity_diagonal_kernel(
    image,  # [N, D]
    text,  # [M, D]
    teacher_image,  # [N, D̂]
    teacher_text,  # [M, D̂]
    projected_image,  # [N, D̂]
    projected_text,  # [M, D̂]
    plane_weight,  # [D]
    rows_out,  # [12, N]
    n,
    width,
    teacher_width,
    label_offset,
    HAS_STUDENT: tl.constexpr,
    HAS_HADAMARD: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_IMAGE_TO_TEACHER: tl.constexpr,
    HAS_TEACHER_TO_TEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Similarities of the positives, in float32. This is O(N D) and keeps the tiles of the large products simple."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = at < n
    rows = tl.minimum(at, n - 1).to(tl.int64)
    columns = rows + label_offset
    out = rows_out + at
    if HAS_STUDENT:
        dots = _dots(image, text, None, rows, columns, width, False, BLOCK_K)
        tl.store(out + DIAGONAL_STUDENT * n, dots, inside)
    if HAS_HADAMARD:
        dots = _dots(image, text, plane_weight, rows, columns, width, True, BLOCK_K)
        tl.store(out + DIAGONAL_HADAMARD * n, dots, inside)
    if HAS_TEACHER:
        dots = _dots(teacher_image, teacher_text, None, rows, columns, teacher_width, False, BLOCK_K)
        tl.store(out + DIAGONAL_TEACHER * n, dots, inside)
    if HAS_IMAGE_TO_TEACHER:
        dots = _dots(projected_image, teacher_text, None, rows, columns, teacher_width, False, BLOCK_K)
        tl.store(out + DIAGONAL_IMAGE_TO_TEACHER * n, dots, inside)
    if HAS_TEACHER_TO_TEXT:
        dots = _dots(teacher_image, projected_text, None, rows, columns, teacher_width, False, BLOCK_K)
        tl.store(out + DIAGONAL_TEACHER_TO_TEXT * n, dots, inside)


@triton.jit(do_not_specialize=["n", "m", "label_offset"])
def _similarity_count_kernel(
    ids,  # [N] int64
    text_ids,  # [M] int64
    rows_out,  # [12, N]
    n,
    m,
    label_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The number of negatives of each row, if ids exclude some."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ids = tl.load(ids + row, row < n, 0)
    count = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, m, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < m
        other = tl.load(text_ids + column, inside, 0)[None, :] != row_ids[:, None]
        positive = column[None, :] == row[:, None] + label_offset
        count += tl.sum((other & inside[None, :] & (positive == 0)).to(tl.int32), 1)
    tl.store(rows_out + NEGATIVES * n + row, count.to(tl.float32), row < n)
