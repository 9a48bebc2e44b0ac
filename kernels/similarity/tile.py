"""Helpers of the similarity kernels: a tile of a product, its negatives, stable functions."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LOG2E, reciprocal, rounded_to_tf32


@triton.jit
def product(
    left,  # [N, width]
    right,  # [M, width]
    row,  # [BLOCK_M]; an index beyond the end is replaced by the last one, as in column
    column,  # [BLOCK_N]
    n,
    m,
    width,
    TILE: tl.constexpr,  # tuning.Tiling
):  # [BLOCK_M, BLOCK_N] float32
    """Returns the tile of left rightᵀ at these rows and columns."""
    # Triton 3.6 takes no string, and no number in a tuple, that is not a constexpr
    PRECISION: tl.constexpr = TILE.PRECISION
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    depth = tl.arange(0, TILE.BLOCK_K)
    left += tl.minimum(row, n - 1).to(tl.int64)[:, None] * width + depth[None, :]
    right += tl.minimum(column, m - 1).to(tl.int64)[None, :] * width + depth[:, None]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, TILE.BLOCK_K):
        if TILE.EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            inside = depth < width - k
            a = tl.load(left, inside[None, :], 0.0)
            b = tl.load(right, inside[:, None], 0.0)
        if PRECISION == "tf32":
            a, b = rounded_to_tf32(a), rounded_to_tf32(b)
        tile = tl.dot(a, b, tile, input_precision=PRECISION)
        left += TILE.BLOCK_K
        right += TILE.BLOCK_K
    return tile


@triton.jit
def load_clamped(values, index, size):  # [size], [BLOCK]
    """Loads values at these indices; an index beyond the end loads the last value."""
    return tl.load(values + tl.minimum(index, size - 1))


@triton.jit
def is_negative(
    masked,  # [BLOCK_M, BLOCK_N] or None
    row,  # [BLOCK_M]
    column,  # [BLOCK_N]
    n,
    m,
    label_offset,
    ids,  # [N] or None
    text_ids,  # [M] or None
):  # [BLOCK_M, BLOCK_N]
    """Whether an entry is in the matrix, not the row's positive, and of another id than the row.

    masked: a tile in registers that is -inf at all other entries, and is then used alone; or None.
    A mask of its own would need registers too.
    """
    if masked is not None:
        return masked != -INF
    else:
        inside = (row < n)[:, None] & (column < m)[None, :]
        negative = inside & (column[None, :] != row[:, None] + label_offset)
        if ids is not None:
            row_id = load_clamped(ids, row, n)
            column_id = load_clamped(text_ids, column, m)
            negative = negative & (row_id[:, None] != column_id[None, :])
        return negative


@triton.jit
def softplus_and_sigmoid(x):
    """Returns (log(1 + e^x), 1 / (1 + e^-x)) of each element of a tile, stable for any x.

    log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, by a polynomial with relative error 4e-7.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008539198897778988 * e + 0.04408959671854973
    p = p * e - 0.10768166184425354
    p = p * e + 0.17745238542556763
    p = p * e - 0.24495461583137512
    p = p * e + 0.33275479078292847
    p = p * e - 0.4999740421772003
    p = p * e + 0.9999998211860657
    return p * e + tl.maximum(x, 0.0), tl.where(x < 0.0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def exp(x):
    """Returns e^x of each element, for x = logit - log-sum-exp.

    Both are rounded in base e: a factor log2(e) in each would leave a rounding error, of large
    logits one that is far from 1 after the exponential.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def finite(maximum):
    """Returns a finite shift for exponentials: the maximum, or 0 where that is -inf."""
    return tl.where(maximum == -INF, 0.0, maximum)


@triton.jit
def times_nonzero(weight, value):
    """Returns weight * value, 0 where weight is 0 even if value is infinite."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def online_max(maximum, logits, AXIS: tl.constexpr):
    """Returns (new maximum, finite shift for exponentials, factor of earlier sums).

    maximum: the running maximum, to which a tile of logits is added along AXIS.
    """
    new = tl.maximum(maximum, tl.max(logits, AXIS))
    shift = finite(new)
    return new, shift, exp(maximum - shift)
