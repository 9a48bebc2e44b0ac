"""Backward kernels of similarity_loss: gradients of a block of each of the student's matrices, which is computed again."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LOG2E, narrowed, uniform
from simplclip.kernels.similarity.merge import (
    DIAGONAL_IMAGE_TO_TEACHER,
    DIAGONAL_STUDENT,
    DIAGONAL_TEACHER_TO_TEXT,
    LSE_CROSS,
    LSE_STUDENT,
    LSE_TEACHER,
    MEAN_CROSS,
    MEAN_STUDENT,
    SIGMOID,
)
from simplclip.kernels.similarity.tile import (
    clamped,
    interior,
    masked,
    product,
    sigmoid_entries,
    store,
    weights,
)

SUMS = 6  # d_scale, d_cross_scale, d_sigmoid_weight and d_sigmoid_bias of each term
_SUMS: tl.constexpr = tl.constexpr(SUMS)
FACTORS = 16  # index of the rows' factors; the columns' factors begin at the next multiple of 16 after the rows'
_FACTORS: tl.constexpr = tl.constexpr(FACTORS)


@triton.jit
def _stat(stats, STAT: tl.constexpr, size, at):
    return clamped(stats + STAT * size, at, size)


@triton.jit
def _softmax(logits, stats, LSE: tl.constexpr, size, at, AXIS: tl.constexpr):
    """Returns the softmax along an axis from its log-sum-exps, which are -inf without negatives, as then are all logits."""
    lse = _stat(stats, LSE, size, at)
    return weights(logits, tl.expand_dims(tl.where(lse == -INF, 0.0, lse * LOG2E), AXIS))


@triton.jit
def _total(tile):  # [BLOCK_M, BLOCK_N]
    return tl.sum(tile)


@triton.jit
def _store(
    out, value, grad_rows, DIAGONAL: tl.constexpr, factor, plain, at, of, out_stride, row, column, n, m, label_offset,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the positives' gradients to a matrix's gradient and stores it, multiplied by the factor if there is one."""
    if not plain:
        positive = column[None, :] == row[:, None] + label_offset
        value = tl.where(positive, value + _stat(grad_rows, DIAGONAL, n, row)[:, None], value)
    if factor is not None:
        value *= tl.load(factor)
    out += at.to(tl.int64)[:, None] * out_stride + of[None, :]
    store(out, narrowed(value, out.dtype.element_ty, INTERPRETED), plain, row, column, n, m)


@triton.jit
def _span(stats, size, most, least, BLOCK: tl.constexpr):
    """Updates `most` and `least` [BLOCK], the largest and the least log-sum-exp in base 2; the least ignores -inf."""
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lse = tl.load(stats + LSE_STUDENT * size.to(tl.int64) + at, at < size, -INF) * LOG2E
        most = tl.maximum(most, lse)
        least = tl.minimum(least, tl.where(lse == -INF, INF, lse))
    return most, least


@triton.jit
def _factors(out, stats, grad, size, top, by, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lse = tl.load(stats + LSE_STUDENT * size.to(tl.int64) + at, at < size, -INF) * LOG2E
        factor = tl.load(grad + LSE_STUDENT * size.to(tl.int64) + at, at < size, 0.0) * by
        tl.store(out + at, tl.where(lse == -INF, 0.0, factor * tl.exp2(top - lse)), at < size)


@triton.jit(do_not_specialize=["n", "m"])
def _similarity_factors_kernel(
    rows,  # [11, N]
    columns,  # [5, M]
    grad_rows,
    grad_columns,
    scale,  # []
    out,  # [FACTORS + N + M, and up to 15 between]
    n,
    m,
    COLUMNS: tl.constexpr,
    ATTEND: tl.constexpr,
    KEPT: tl.constexpr,  # whether exponentials are kept relative to the positives, which then have to be near too
    BLOCK: tl.constexpr,
):
    """Writes top, the largest log-sum-exp of a softmax, whether all are near top, and the factors a, b. One program.

    With u the gradients of log-sum-exps r, c, a negative's similarity has gradient s (u_i 2^(z - r_i) + u_j 2^(z - c_j)) =
    2^(z - top) (a_i + b_j). With r and c within 100 of top, what an exponential loses is negligible in any row or column.
    """
    most, least = _span(rows, n, tl.full((BLOCK,), -INF, tl.float32), tl.full((BLOCK,), INF, tl.float32), BLOCK)
    if COLUMNS:
        most, least = _span(columns, m, most, least, BLOCK)
    top = tl.max(most, 0)
    by = tl.load(scale)
    bottom = tl.min(least, 0)
    near = (top - bottom < 100.0) & (tl.abs(top) < INF) & (tl.abs(by) > 1e-30)
    if KEPT:
        most, least = tl.full((BLOCK,), -INF, tl.float32), tl.full((BLOCK,), INF, tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = _stat(rows, DIAGONAL_STUDENT, n, at) * by * LOG2E
            most, least = tl.maximum(most, z), tl.minimum(least, z)
        near = near & (tl.max(most, 0) - bottom < 100.0) & (top - tl.min(least, 0) < 120.0) & (tl.abs(by) >= 1.0)
    tl.store(out, top)
    tl.store(out + 1, near.to(tl.float32))
    if ATTEND:
        by = 1.0
    out += _FACTORS
    _factors(out, rows, grad_rows, n, top, by, BLOCK)
    if COLUMNS:
        _factors(out + (n + 15) // 16 * 16, columns, grad_columns, m, top, by, BLOCK)


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
    factors,  # the result of _similarity_factors_kernel, None in a launch with the teacher's matrix
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
    ATTEND: tl.constexpr,  # only with Z: store the logits' gradient, which is the softmax, not the similarities' gradient
    KEPT: tl.constexpr,  # whether _similarity_kept_kernel has computed the block, if all is near
):
    """Writes a tile of G of each of the student's matrices, and adds to this program's sums of the scalars' gradients."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    if KEPT:  # noqa: SIM102 a compile-time constant, the next condition is not
        if tl.load(factors + 1) > 0.0:
            return
    program = tl.program_id(0)
    at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + at
    of = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_column + of
    safe_row, safe_column = tl.minimum(row, n - 1).to(tl.int64), tl.minimum(column, m - 1).to(tl.int64)
    matrix_stride = tl.cast(matrix_stride, tl.int64)
    u_at: tl.constexpr = 1 if LAUNCH.HAS_STUDENT else 0  # index of U in `out`
    d_scale, d_cross = 0.0, 0.0
    t = None

    plain = False
    if pairs.ids is None:
        first_row += program % row_blocks * BLOCK_M
        first_column += program // row_blocks * BLOCK_N
        plain = interior(first_row, first_column, n, m, label_offset, BLOCK_M, BLOCK_N)

    if LAUNCH.HAS_TEACHER:
        raw = product(teacher_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        t = raw * (tl.load(teacher_scale) * LOG2E)
        t = masked(t, None, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)

    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        raw = product(projected_image, teacher_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        u_scale = tl.load(cross_scale)
        u = raw * (u_scale * LOG2E)
        u = masked(u, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
        g = _stat(grad_rows, LSE_CROSS, n, row)[:, None] * _softmax(u, rows, LSE_CROSS, n, row, 1)
        g -= _stat(grad_rows, MEAN_CROSS, n, row)[:, None] * _softmax(t, rows, LSE_TEACHER, n, row, 1)
        d_cross += _total(g * raw)
        _store(
            out + u_at * matrix_stride, g * u_scale, grad_rows, DIAGONAL_IMAGE_TO_TEACHER, factor, plain, at, of,
            out_stride, row, column, n, m, label_offset, TILE.INTERPRETED,
        )  # fmt: skip

    if LAUNCH.HAS_TEACHER_TO_TEXT:
        raw = product(teacher_image, projected_text, safe_row, safe_column, teacher_width, TILE.TEACHER_EVEN, TILE)
        u_scale = tl.load(cross_scale)
        v = raw * (u_scale * LOG2E)
        v = masked(v, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
        g = _stat(grad_columns, LSE_CROSS, m, column)[None, :] * _softmax(v, columns, LSE_CROSS, m, column, 0)
        g -= _stat(grad_columns, MEAN_CROSS, m, column)[None, :] * _softmax(t, columns, LSE_TEACHER, m, column, 0)
        d_cross += _total(g * raw)
        _store(
            out + (u_at + 1) * matrix_stride, g * u_scale, grad_rows, DIAGONAL_TEACHER_TO_TEXT, factor, plain, at, of,
            out_stride, row, column, n, m, label_offset, TILE.INTERPRETED,
        )  # fmt: skip

    if LAUNCH.HAS_STUDENT:
        raw = product(image, text, safe_row, safe_column, width, TILE.EVEN, TILE)
        z_scale = tl.load(scale)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        quick = False
        if factors is not None:
            quick = uniform(plain & (tl.load(factors + 1) > 0.0), TILE.INTERPRETED)
        if quick:
            if factors is not None:
                sides = tl.load(factors + _FACTORS + row)[:, None]
                if LAUNCH.COLUMNS:
                    sides = sides + tl.load(factors + _FACTORS + (n + 15) // 16 * 16 + column)[None, :]
                g = weights(raw * (z_scale * LOG2E), tl.load(factors)) * sides
                d_scale += _total(g * raw) / (1.0 if ATTEND else z_scale)
        else:
            z = raw * (z_scale * LOG2E)
            z = masked(z, t, plain, row, column, n, m, label_offset, pairs, LAUNCH.DROP_IDS)
            if LAUNCH.RELATIONAL:
                g -= _stat(grad_rows, MEAN_STUDENT, n, row)[:, None] * _softmax(t, rows, LSE_TEACHER, n, row, 1)
                if LAUNCH.COLUMNS:
                    g -= _stat(grad_columns, MEAN_STUDENT, m, column)[None, :] * _softmax(
                        t, columns, LSE_TEACHER, m, column, 0
                    )
            g += _stat(grad_rows, LSE_STUDENT, n, row)[:, None] * _softmax(z, rows, LSE_STUDENT, n, row, 1)
            if LAUNCH.COLUMNS:
                g += _stat(grad_columns, LSE_STUDENT, m, column)[None, :] * _softmax(z, columns, LSE_STUDENT, m, column, 0)
            d_scale += _total(g * raw)
            if not ATTEND:
                g *= z_scale
        if LAUNCH.SIGMOIDS > 0:
            SIGMOIDS: tl.constexpr = LAUNCH.SIGMOIDS
            for k in tl.static_range(SIGMOIDS):
                _, slope, amount = sigmoid_entries(raw, sigmoids, plain, row, column, n, m, label_offset, pairs, k, TILE)
                slope *= amount * _stat(grad_rows, SIGMOID + k, n, row)[:, None]
                at_sums = sums + program * _SUMS + 2 + 2 * k
                tl.store(at_sums, tl.load(at_sums) + _total(slope * raw))
                tl.store(at_sums + 1, tl.load(at_sums + 1) + _total(slope))
                g += slope * tl.load(sigmoids.weight + k)
        _store(
            out, g, grad_rows, DIAGONAL_STUDENT, factor, plain, at, of, out_stride, row, column, n, m, label_offset,
            TILE.INTERPRETED,
        )  # fmt: skip

    sums += program * _SUMS
    if LAUNCH.HAS_STUDENT:
        tl.store(sums, tl.load(sums) + d_scale)
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        tl.store(sums + 1, tl.load(sums + 1) + d_cross)


@triton.jit(do_not_specialize=["n", "m", "label_offset", "first_row", "first_column", "row_blocks"])
def _similarity_kept_kernel(
    kept,  # [kept_rows, M], see _similarity_statistics_kernel
    rows,  # [11, N]
    grad_rows,  # [11, N]
    scale,  # []
    factors,  # the result of _similarity_factors_kernel
    factor,  # [] or None
    out,  # [rows, out_stride]
    sums,  # [programs, SUMS]
    n,
    m,
    label_offset,
    first_row,
    first_column,
    row_blocks,
    kept_stride,
    out_stride,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Writes a tile of G, as _similarity_gradient_kernel, from exponentials that forward kept; nothing unless all is near."""
    if tl.load(factors + 1) > 0.0:
        program = tl.program_id(0)
        at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        of = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = first_row + at, first_column + of
        inside = (row < n)[:, None] & (column < m)[None, :]
        share = tl.load(kept + row.to(tl.int64)[:, None] * kept_stride + column[None, :], inside, 0.0).to(tl.float32)
        z_scale = tl.load(scale) * LOG2E
        positive = _stat(rows, DIAGONAL_STUDENT, n, row) * z_scale
        sides = clamped(factors + _FACTORS, row, n)[:, None]
        if COLUMNS:
            sides = sides + clamped(factors + _FACTORS + (n + 15) // 16 * 16, column, m)[None, :]
        g = share * tl.exp2(positive - tl.load(factors))[:, None] * sides
        raw = tl.where(share > 0.0, (tl.log2(share) + positive[:, None]) / z_scale, 0.0)
        sums += program * _SUMS
        tl.store(sums, tl.load(sums) + _total(g * raw) / tl.load(scale))
        plain = tl.program_id(0) < 0
        _store(
            out, g, grad_rows, DIAGONAL_STUDENT, factor, plain, at, of, out_stride, row, column, n, m, label_offset,
            INTERPRETED,
        )  # fmt: skip
