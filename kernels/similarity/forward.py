"""Forward kernel of similarity_loss: statistics of rows and columns of tiles, which merge.py merges."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, LOG2E
from simplclip.kernels.similarity.tile import negatives, product, raised, softplus, weighted, weights


@triton.jit
def _column_base(logits):  # [BLOCK_M, BLOCK_N]
    maximum = tl.max(logits, 0)
    return maximum, tl.where(maximum == -INF, 0.0, maximum)


@triton.jit(
    do_not_specialize=["n", "m", "label_offset", "first_row", "row_count", "row_blocks", "splits", "tiles_per_split"],
)
def _similarity_statistics_kernel(
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
    row_parts,  # [splits, row slots, row_count]
    column_parts,  # [row_blocks, column slots, M]
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
    TEACHER_AT: tl.constexpr,
    CROSS_AT: tl.constexpr,
    STUDENT_AT: tl.constexpr,
    PAIR_MATCHING_AT: tl.constexpr,
    ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Statistics of a block of rows over a range of column tiles, and of each of those columns over the block.

    Planes are processed one after the other. T is kept, since means need it, so that at most two tiles are in registers. For
    the same reason T's weights are computed after the product of the next plane, not before it. Slots of the parts: [*_AT]
    maximum, then the sum of 2^(logit - maximum), then sums with these weights.
    """
    # GROUP blocks of rows with all their splits alternate, so that programs at a time share rows and columns.
    program = tl.program_id(0)
    first_block = program // (GROUP * splits) * GROUP
    group = tl.minimum(row_blocks - first_block, GROUP)
    within = program % (GROUP * splits)
    row_block = first_block + within % group
    split = within // group

    at = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = at < row_count
    row = first_row + at
    safe_row = tl.minimum(row, n - 1).to(tl.int64)

    none = tl.full((BLOCK_M,), -INF, tl.float32)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    max_t, sum_t, mean_z, mean_x = none, zero, zero, zero
    max_x, sum_x = none, zero
    max_z, sum_z, match = none, zero, zero

    row_ids = row
    if HAS_IDS:
        row_ids = tl.load(ids + safe_row)
    if HAS_STUDENT:
        z_scale = tl.load(scale) * LOG2E
    if HAS_TEACHER:
        t_scale = tl.load(teacher_scale) * LOG2E
    if HAS_IMAGE_TO_TEACHER or HAS_TEACHER_TO_TEXT:
        x_scale = tl.load(cross_scale) * LOG2E
    if ALL_NEGATIVES or HARD_NEGATIVES:
        bias = tl.load(plane_bias)
        if not HAS_HADAMARD:
            slope = tl.load(plane_weight)

    tiles = (m + BLOCK_N - 1) // BLOCK_N
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_inside = column < m
        safe_column = tl.minimum(column, m - 1).to(tl.int64)
        if COLUMNS:
            parts_at = column_parts + row_block.to(tl.int64) * COLUMN_SLOTS * m + column

        if HAS_TEACHER:
            raw = product(
                teacher_image, teacher_text, None, safe_row, safe_column, teacher_width,
                TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
            )  # fmt: skip
            negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
            t = raw * t_scale
            t = tl.where(negative, t + 0.0 * t, -INF)  # NaN where it is infinite, since -inf means no negative
            max_t, base_t, shrink = raised(max_t, t, 1)
            sum_t *= shrink
            if RELATIONAL:
                mean_z *= shrink
            if KL:
                mean_x *= shrink
            if COLUMNS:
                maximum, column_base_t = _column_base(t)
                tl.store(parts_at + TEACHER_AT * m, maximum, column_inside)

        if HAS_IMAGE_TO_TEACHER:
            raw = product(
                projected_image, teacher_text, None, safe_row, safe_column, teacher_width,
                TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
            )  # fmt: skip
            if HAS_TEACHER:
                negative = t != -INF
            else:
                negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
            u = raw * x_scale
            if KL:
                share = weights(t, base_t[:, None])
                sum_t += tl.sum(share, 1)
                mean_x += tl.sum(weighted(share, entropy * t - u), 1)
            u = tl.where(negative, u, -INF)
            max_x, base, shrink = raised(max_x, u, 1)
            sum_x = sum_x * shrink + tl.sum(weights(u, base[:, None]), 1)

        if HAS_TEACHER_TO_TEXT and COLUMNS:
            raw = product(
                teacher_image, projected_text, None, safe_row, safe_column, teacher_width,
                TEACHER_EVEN, False, PRECISION, INTERPRETED, BLOCK_K,
            )  # fmt: skip
            if HAS_TEACHER:
                negative = t != -INF
            else:
                negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
            v = raw * x_scale
            if KL:
                share = weights(t, column_base_t[None, :])
                mean = tl.sum(weighted(share, entropy * t - v), 0)
                tl.store(parts_at + (TEACHER_AT + 1) * m, tl.sum(share, 0), column_inside)
                tl.store(parts_at + (TEACHER_AT + 2 + RELATIONAL) * m, mean * LN2, column_inside)
            v = tl.where(negative, v, -INF)
            maximum, base = _column_base(v)
            tl.store(parts_at + CROSS_AT * m, maximum, column_inside)
            tl.store(parts_at + (CROSS_AT + 1) * m, tl.sum(weights(v, base[None, :]), 0), column_inside)

        if HAS_STUDENT:
            raw = product(
                image, text, None, safe_row, safe_column, width, EVEN, False, PRECISION, INTERPRETED, BLOCK_K
            )  # fmt: skip
            if HAS_TEACHER:
                negative = t != -INF
            else:
                negative = negatives(row, column, row_inside, m, label_offset, row_ids, text_ids, safe_column, HAS_IDS)
            z = raw * z_scale
            if RELATIONAL:
                gap = entropy * t - z
                if KL:  # another base than U's and V's: equal exponentials would be kept in registers across the products
                    share = weights(t, base_t[:, None] + 1.0)
                    mean_z += tl.sum(weighted(share, gap), 1) * 2.0
                else:
                    share = weights(t, base_t[:, None])
                    sum_t += tl.sum(share, 1)
                    mean_z += tl.sum(weighted(share, gap), 1)
                if COLUMNS:
                    if KL:
                        share = weights(t, column_base_t[None, :] + 1.0)
                        mean = tl.sum(weighted(share, gap), 0) * 2.0
                    else:
                        share = weights(t, column_base_t[None, :])
                        tl.store(parts_at + (TEACHER_AT + 1) * m, tl.sum(share, 0), column_inside)
                        mean = tl.sum(weighted(share, gap), 0)
                    tl.store(parts_at + (TEACHER_AT + 2) * m, mean * LN2, column_inside)
            z = tl.where(negative, z, -INF)
            if SOFTMAX:
                max_z, base_z, shrink = raised(max_z, z, 1)
                sum_z = sum_z * shrink + tl.sum(weights(z, base_z[:, None]), 1)
                if COLUMNS:
                    column_max, column_base = _column_base(z)
                    tl.store(parts_at + STUDENT_AT * m, column_max, column_inside)
                    tl.store(parts_at + (STUDENT_AT + 1) * m, tl.sum(weights(z, column_base[None, :]), 0), column_inside)
            if HAS_HADAMARD:
                raw = product(
                    image, text, plane_weight, safe_row, safe_column, width, EVEN, True, PRECISION, INTERPRETED, BLOCK_K
                )  # fmt: skip
            if ALL_NEGATIVES or HARD_NEGATIVES:
                loss = softplus(raw + bias) if HAS_HADAMARD else softplus(raw * slope + bias)
            if ALL_NEGATIVES:
                match += tl.sum(tl.where(z != -INF, loss, 0.0), 1)
            if HARD_NEGATIVES:
                match = match * shrink + tl.sum(weights(z, base_z[:, None]) * loss, 1)
                if COLUMNS:
                    tl.store(
                        parts_at + (STUDENT_AT + 2) * m, tl.sum(weights(z, column_base[None, :]) * loss, 0), column_inside
                    )

    row_at = row_parts + split.to(tl.int64) * ROW_SLOTS * row_count + at
    if HAS_TEACHER:
        tl.store(row_at + TEACHER_AT * row_count, max_t, row_inside)
        tl.store(row_at + (TEACHER_AT + 1) * row_count, sum_t, row_inside)
        if RELATIONAL:
            tl.store(row_at + (TEACHER_AT + 2) * row_count, mean_z * LN2, row_inside)
        if KL:
            tl.store(row_at + (TEACHER_AT + 2 + RELATIONAL) * row_count, mean_x * LN2, row_inside)
    if HAS_IMAGE_TO_TEACHER:
        tl.store(row_at + CROSS_AT * row_count, max_x, row_inside)
        tl.store(row_at + (CROSS_AT + 1) * row_count, sum_x, row_inside)
    if SOFTMAX:
        tl.store(row_at + STUDENT_AT * row_count, max_z, row_inside)
        tl.store(row_at + (STUDENT_AT + 1) * row_count, sum_z, row_inside)
        if HARD_NEGATIVES:
            tl.store(row_at + (STUDENT_AT + 2) * row_count, match, row_inside)
    if ALL_NEGATIVES:
        tl.store(row_at + PAIR_MATCHING_AT * row_count, match, row_inside)
