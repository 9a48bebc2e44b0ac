"""Forward kernel of similarity_loss: statistics of rows and columns of tiles, which merge.py merges."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, LOG2E, narrowed, uniform
from simplclip.kernels.similarity.tile import (
    clamped,
    interior,
    masked,
    product,
    raised,
    sigmoid_entries,
    store,
    weighted,
    weights,
)

LARGE: tl.constexpr = tl.constexpr(2.0**100)


@triton.jit
def _column_maximum(logits, part, inside):  # logits [BLOCK_M, BLOCK_N]
    """Stores the maxima of the columns; returns a finite base for exponentials."""
    maximum = tl.max(logits, 0)
    base = tl.where(maximum == -INF, 0.0, maximum)
    tl.store(part, maximum, inside)
    return base


@triton.jit
def _column_softmax(logits, part, m, inside):
    """Stores the maxima and the sums of the columns."""
    base = _column_maximum(logits, part, inside)
    tl.store(part + m, tl.sum(weights(logits, base[None, :]), 0), inside)


@triton.jit(
    do_not_specialize=[
        "n",
        "m",
        "label_offset",
        "first_row",
        "row_count",
        "row_blocks",
        "splits",
        "tiles_per_split",
    ],
)
def _similarity_statistics_kernel(
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
    row_parts,  # [splits, row slots, row_count]
    column_parts,  # [row_blocks, column slots, M]
    kept,  # [rows, M] or None: the exponentials 2^(z - z of the row's positive), where z has a launch of its own
    positives,  # [N]: the positives' similarities, with `kept`
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
    kept_stride,
    LAUNCH: tl.constexpr,  # launch.Launch
    SLOTS: tl.constexpr,  # launch.Slots
    TILE: tl.constexpr,  # launch.Tiling
    GROUP: tl.constexpr,
):
    """Computes statistics of a block of rows over a range of column tiles, and of each of these columns over the block.

    Matrices are processed one after the other, and only T is kept, since means need T: at most two tiles are in registers.
    For the same reason T's weights are computed after the product of the next matrix, not before it. Slots of the parts:
    maximum, then the sum of 2^(logit - maximum), then sums with these weights.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    # Programs go through GROUP blocks of rows in turn, so that those that run together read the same rows and columns.
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
    max_t, sum_t, mean_z, mean_u = none, zero, zero, zero
    max_u, sum_u = none, zero
    max_z, sum_z = none, zero
    first_sigmoid, second_sigmoid = zero, zero

    top = INF  # the largest of max_z, once each row has a maximum
    if LAUNCH.HAS_STUDENT:
        z_scale = tl.load(scale) * LOG2E
    if LAUNCH.HAS_TEACHER:
        t_scale = tl.load(teacher_scale) * LOG2E
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        u_scale = tl.load(cross_scale) * LOG2E

    tiles = (m + BLOCK_N - 1) // BLOCK_N
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < m
        safe_column = tl.minimum(column, m - 1).to(tl.int64)
        if LAUNCH.COLUMNS:
            parts_at = column_parts + row_block.to(tl.int64) * SLOTS.COLUMNS * m + column
        t = None
        plain = False
        if pairs.ids is None:
            plain = interior(first_row + row_block * BLOCK_M, tile * BLOCK_N, n, m, label_offset, BLOCK_M, BLOCK_N)

        if LAUNCH.HAS_TEACHER:
            raw = product(teacher_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
            t = raw * t_scale
            t += 0.0 * t  # NaN for an infinite logit, since -inf would mean that there is no negative
            t = masked(t, None, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
            max_t, base_t, shrink = raised(max_t, t, 1)
            sum_t *= shrink
            if LAUNCH.RELATIONAL:
                mean_z *= shrink
            if LAUNCH.HAS_IMAGE_TO_TEACHER:
                mean_u *= shrink
            if LAUNCH.COLUMNS:
                column_base_t = _column_maximum(t, parts_at + SLOTS.TEACHER * m, inside)

        if LAUNCH.HAS_IMAGE_TO_TEACHER:
            raw = product(projected_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
            u = raw * u_scale
            share = weights(t, base_t[:, None])
            sum_t += tl.sum(share, 1)
            mean_u += tl.sum(weighted(share, entropy * t - u), 1)
            u = masked(u, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
            max_u, base, shrink = raised(max_u, u, 1)
            sum_u = sum_u * shrink + tl.sum(weights(u, base[:, None]), 1)

        if LAUNCH.HAS_TEACHER_TO_TEXT:
            raw = product(teacher_image, projected_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
            v = raw * u_scale
            share = weights(t, column_base_t[None, :])
            mean = tl.sum(weighted(share, entropy * t - v), 0)
            tl.store(parts_at + (SLOTS.TEACHER + 1) * m, tl.sum(share, 0), inside)
            tl.store(parts_at + SLOTS.MEAN_CROSS * m, mean * LN2, inside)
            v = masked(v, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
            _column_softmax(v, parts_at + SLOTS.CROSS * m, m, inside)

        if LAUNCH.HAS_STUDENT:
            raw = product(image, text, safe_row, safe_column, width, TILE.EVEN, TILE)
            z = raw * z_scale
            if LAUNCH.RELATIONAL:
                gap = entropy * t - z
                if LAUNCH.HAS_IMAGE_TO_TEACHER:
                    # A base other than U's and V's: equal exponentials would be kept in registers across the products.
                    share = weights(t, base_t[:, None] + 1.0)
                    mean_z += tl.sum(weighted(share, gap), 1) * 2.0
                else:
                    share = weights(t, base_t[:, None])
                    sum_t += tl.sum(share, 1)
                    mean_z += tl.sum(weighted(share, gap), 1)
                if LAUNCH.COLUMNS:
                    if LAUNCH.HAS_IMAGE_TO_TEACHER:
                        share = weights(t, column_base_t[None, :] + 1.0)
                        mean = tl.sum(weighted(share, gap), 0) * 2.0
                    else:
                        share = weights(t, column_base_t[None, :])
                        tl.store(parts_at + (SLOTS.TEACHER + 1) * m, tl.sum(share, 0), inside)
                        mean = tl.sum(weighted(share, gap), 0)
                    tl.store(parts_at + SLOTS.MEAN_STUDENT * m, mean * LN2, inside)
            fits = False
            share = z
            if t is None and pairs.ids is None:  # noqa: SIM102 a compile-time constant, the next condition is not
                if uniform(plain & (top < INF), TILE.INTERPRETED):
                    # One exponential, with an earlier maximum, serves row and column if no sum leaves the range of float32.
                    share = weights(z, max_z[:, None])
                    of_row = tl.sum(share, 1)
                    fits = tl.max(of_row, 0) < LARGE
                    if LAUNCH.COLUMNS:
                        of_column = tl.sum(share * tl.exp2(max_z - top)[:, None], 0)
                        fits = fits & (tl.min(of_column, 0) > 1.0 / LARGE)
                    fits = uniform(fits, TILE.INTERPRETED)
                    if fits:
                        sum_z += of_row
                        if LAUNCH.COLUMNS:
                            tl.store(parts_at + SLOTS.STUDENT * m, tl.zeros((BLOCK_N,), tl.float32) + top)
                            tl.store(parts_at + (SLOTS.STUDENT + 1) * m, of_column)
            if not fits:
                z = masked(z, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
                max_z, base, shrink = raised(max_z, z, 1)
                share = weights(z, base[:, None])
                sum_z = sum_z * shrink + tl.sum(share, 1)
                if LAUNCH.COLUMNS:
                    _column_softmax(z, parts_at + SLOTS.STUDENT * m, m, inside)
                top = tl.where(tl.min(max_z, 0) > -INF, tl.max(max_z, 0), INF)
            if kept is not None:
                past = tl.where(max_z == -INF, 0.0, max_z) - clamped(positives, row, n) * z_scale
                half = tl.exp2(0.5 * past)[:, None]  # 2^past may be too small
                narrow = narrowed(share * half * half, kept.dtype.element_ty, TILE.INTERPRETED)
                store(kept + safe_row[:, None] * kept_stride + column[None, :], narrow, plain, row, column, n, m)
            if LAUNCH.SIGMOIDS > 0:
                value, _, amount = sigmoid_entries(raw, sigmoids, plain, row, column, n, m, label_offset, pairs, 0, TILE)
                first_sigmoid += tl.sum(value, 1) * amount
            if LAUNCH.SIGMOIDS > 1:
                value, _, amount = sigmoid_entries(raw, sigmoids, plain, row, column, n, m, label_offset, pairs, 1, TILE)
                second_sigmoid += tl.sum(value, 1) * amount

    row_at = row_parts + split.to(tl.int64) * SLOTS.ROWS * row_count + at
    if LAUNCH.HAS_TEACHER:
        tl.store(row_at + SLOTS.TEACHER * row_count, max_t, row_inside)
        tl.store(row_at + (SLOTS.TEACHER + 1) * row_count, sum_t, row_inside)
        if LAUNCH.RELATIONAL:
            tl.store(row_at + SLOTS.MEAN_STUDENT * row_count, mean_z * LN2, row_inside)
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        tl.store(row_at + SLOTS.MEAN_CROSS * row_count, mean_u * LN2, row_inside)
        tl.store(row_at + SLOTS.CROSS * row_count, max_u, row_inside)
        tl.store(row_at + (SLOTS.CROSS + 1) * row_count, sum_u, row_inside)
    if LAUNCH.HAS_STUDENT:
        tl.store(row_at + SLOTS.STUDENT * row_count, max_z, row_inside)
        tl.store(row_at + (SLOTS.STUDENT + 1) * row_count, sum_z, row_inside)
    if LAUNCH.SIGMOIDS > 0:
        tl.store(row_at + SLOTS.SIGMOID * row_count, first_sigmoid, row_inside)
    if LAUNCH.SIGMOIDS > 1:
        tl.store(row_at + (SLOTS.SIGMOID + 1) * row_count, second_sigmoid, row_inside)
