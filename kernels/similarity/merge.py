"""Small kernels of similarity_loss's forward: merging partial statistics, and the positives."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, LOG2E
from simplclip.kernels.similarity.tile import raised, weights
from simplclip.ops.similarity.call import RowStat

# Rows of the result of the merge. Columns have the same numbers, in which V takes the place of U.
LSE_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.LSE_STUDENT))
LSE_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.LSE_TEACHER))
LSE_CROSS: tl.constexpr = tl.constexpr(int(RowStat.LSE_IMAGE_TO_TEACHER))
SIGMOID: tl.constexpr = tl.constexpr(int(RowStat.SIGMOID))
MEAN_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.MEAN_STUDENT))
MEAN_CROSS: tl.constexpr = tl.constexpr(int(RowStat.MEAN_IMAGE_TO_TEACHER))
DIAGONAL_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_STUDENT))
DIAGONAL_IMAGE_TO_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_IMAGE_TO_TEACHER))
DIAGONAL_TEACHER_TO_TEXT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_TEACHER_TO_TEXT))


@triton.jit
def _block_of_parts(parts, start, parts_count, part_stride, inside, BLOCK_PARTS: tl.constexpr):
    """Returns pointers to a block of parts [BLOCK_PARTS, BLOCK], and the mask of parts that exist."""
    part = start + tl.arange(0, BLOCK_PARTS)
    return parts[None, :] + part.to(tl.int64)[:, None] * part_stride, (part < parts_count)[:, None] & inside[None, :]


@triton.jit
def _merge_softmax(
    parts,  # [parts, slots, size], at the maxima
    parts_count,
    part_stride,
    size,
    inside,  # [BLOCK]
    out,  # at row 0
    out_stride,
    LSE: tl.constexpr,
    FIRST: tl.constexpr,  # the rows of the result for the weighted means, None where there are none
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
        if FIRST is not None:
            first = tl.load(out + FIRST * out_stride, inside, 0.0)
        if SECOND is not None:
            second = tl.load(out + SECOND * out_stride, inside, 0.0)
    for start in range(0, parts_count, BLOCK_PARTS):
        at, there = _block_of_parts(parts, start, parts_count, part_stride, inside, BLOCK_PARTS)
        part_maximum = tl.load(at, there, -INF)
        maximum, base, shrink = raised(maximum, part_maximum, 0)
        share = weights(part_maximum, base[None, :])
        total = total * shrink + tl.sum(share * tl.load(at + size, there, 0.0), 0)
        if FIRST is not None:
            first = first * shrink + tl.sum(share * tl.load(at + 2 * size, there, 0.0), 0)
        if SECOND is not None:
            slot: tl.constexpr = 2 if FIRST is None else 3
            second = second * shrink + tl.sum(share * tl.load(at + slot * size, there, 0.0), 0)
    tl.store(out + LSE * out_stride, (maximum + tl.log2(total)) * LN2, inside)
    if FIRST is not None:
        tl.store(out + FIRST * out_stride, tl.where(total == 0.0, 0.0, first / total), inside)
    if SECOND is not None:
        tl.store(out + SECOND * out_stride, tl.where(total == 0.0, 0.0, second / total), inside)


@triton.jit(do_not_specialize=["size", "parts_count", "out_stride", "out_first"])
def _similarity_merge_kernel(
    parts,  # [parts_count, slots, size]
    out,  # [11, N] or [5, M]: RowStat's first five rows are ColumnStat's
    size,
    parts_count,
    out_stride,
    out_first,
    LAUNCH: tl.constexpr,  # launch.Launch
    SLOTS: tl.constexpr,  # launch.Slots
    OF_ROWS: tl.constexpr,  # else of columns, which are merged with the statistics over earlier rows that `out` holds
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the statistics of the parts, in an order that depends only on their number."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    out += out_first + at
    parts += at
    stride = size.to(tl.int64) * (SLOTS.ROWS if OF_ROWS else SLOTS.COLUMNS)
    if LAUNCH.HAS_TEACHER:
        first: tl.constexpr = MEAN_STUDENT if LAUNCH.RELATIONAL else None
        second: tl.constexpr = MEAN_CROSS if LAUNCH.HAS_IMAGE_TO_TEACHER else None
        _merge_softmax(
            parts + SLOTS.TEACHER * size, parts_count, stride, size, inside, out, out_stride, LSE_TEACHER, first, second,
            not OF_ROWS, BLOCK_PARTS,
        )  # fmt: skip
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        _merge_softmax(
            parts + SLOTS.CROSS * size, parts_count, stride, size, inside, out, out_stride, LSE_CROSS, None, None,
            not OF_ROWS, BLOCK_PARTS,
        )  # fmt: skip
    if LAUNCH.HAS_STUDENT:
        _merge_softmax(
            parts + SLOTS.STUDENT * size, parts_count, stride, size, inside, out, out_stride, LSE_STUDENT, None, None,
            not OF_ROWS, BLOCK_PARTS,
        )  # fmt: skip
    if OF_ROWS:
        SIGMOIDS: tl.constexpr = LAUNCH.SIGMOIDS
        for k in tl.static_range(SIGMOIDS):
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, parts_count, BLOCK_PARTS):
                losses, there = _block_of_parts(
                    parts + (SLOTS.SIGMOID + k) * size, start, parts_count, stride, inside, BLOCK_PARTS
                )
                total += tl.sum(tl.load(losses, there, 0.0), 0)
            tl.store(out + (SIGMOID + k) * out_stride, total, inside)


@triton.jit(do_not_specialize=["n", "label_offset"])
def _similarity_diagonal_kernel(
    image,  # [N, width]
    text,  # [M, width]
    out,  # [N]
    n,
    width,
    label_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a matrix's similarities of the positives in float32, O(N D). So the large products' tiles stay simple."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(at, n - 1).to(tl.int64)
    columns = rows + label_offset
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = (depth < width)[None, :]
        a = tl.load(image + rows[:, None] * width + depth[None, :], inside, 0.0).to(tl.float32)
        b = tl.load(text + columns[:, None] * width + depth[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    tl.store(out + at, total, at < n)
