"""Helpers of similarity_loss's forward and backward kernels: a tile of a product, its negatives, stable functions."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.arithmetic import INF, LOG2E, dot, reciprocal, rounded_to_tf32
from simplclip.ops.similarity.call import SigmoidCall, SimilarityCall


class Pairs(NamedTuple):
    """An argument of the kernels: ids, by which columns belong to a row beside its own pair, and the positives' shares."""

    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    image_share: Tensor | None  # [N]
    text_share: Tensor | None  # [M]

    @classmethod
    def of(cls, call: SimilarityCall | SigmoidCall) -> Pairs:
        return cls(call.ids, call.text_ids, call.image_share, call.text_share)


class Sigmoids(NamedTuple):
    """An argument of the kernels: the numbers of the sigmoid terms, [K] each."""

    weight: Tensor | None
    bias: Tensor | None
    negative: Tensor | None
    positive: Tensor | None

    @classmethod
    def of(cls, call: SimilarityCall) -> Sigmoids:
        return cls(call.sigmoid_weight, call.sigmoid_bias, call.sigmoid_negative, call.sigmoid_positive)


@triton.jit
def product(
    left,  # [N, width]
    right,  # [M, width]
    rows,  # [BLOCK_M] int64, inside left
    columns,  # [BLOCK_N] int64, inside right
    width,
    EVEN: tl.constexpr,  # width is a multiple of BLOCK_K
    TILE: tl.constexpr,  # launch.Tiling
):  # [BLOCK_M, BLOCK_N] float32
    """Returns the tile of left rightᵀ at these rows and columns."""
    PRECISION: tl.constexpr = TILE.PRECISION  # Triton 3.6 takes no string, and no number in a tuple, that is not a constexpr
    depth = tl.arange(0, TILE.BLOCK_K)
    left_at = left + rows[:, None] * width + depth[None, :]
    right_at = right + columns[None, :] * width + depth[:, None]
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, width, TILE.BLOCK_K):
        if EVEN:
            a = tl.load(left_at)
            b = tl.load(right_at)
        else:
            inside = depth < width - k
            a = tl.load(left_at, inside[None, :], 0.0)
            b = tl.load(right_at, inside[:, None], 0.0)
        if PRECISION == "tf32":  # never interpreted
            a, b = rounded_to_tf32(a), rounded_to_tf32(b)
        tile = dot(a, b, tile, PRECISION, TILE.INTERPRETED)
        left_at += TILE.BLOCK_K
        right_at += TILE.BLOCK_K
    return tile


@triton.jit
def clamped(values, at, size):
    """Loads the values at the indices `at`; an index beyond the end loads the last value."""
    return tl.load(values + tl.minimum(at, size - 1))


@triton.jit
def masked(logits, t, plain, row, column, n, m, label_offset, pairs, DROP_IDS: tl.constexpr):
    """Returns a softmax's logits at negatives, and -inf elsewhere: outside of the matrix, at the positive, at the row's id.

    The teacher's logits t, if given, are -inf there too: as a mask they need no more registers. A plain tile needs no mask.
    """
    if not plain:
        if t is not None:
            negative = t != -INF
        else:
            negative = (row < n)[:, None] & (column < m)[None, :] & (column[None, :] != row[:, None] + label_offset)
            if DROP_IDS:
                negative = negative & (clamped(pairs.ids, row, n)[:, None] != clamped(pairs.text_ids, column, m)[None, :])
        logits = tl.where(negative, logits, -INF)
    return logits


@triton.jit
def interior(row, column, n, m, label_offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile, by its first row and column, is inside the matrix and has no positive, so that it needs no mask."""
    inside = (row + BLOCK_M <= n) & (column + BLOCK_N <= m)
    return inside & ((column + BLOCK_N <= row + label_offset) | (column >= row + label_offset + BLOCK_M))


@triton.jit
def store(out, value, plain, row, column, n, m):
    """Stores a tile. Rows of a plain tile are stored in whole vectors, since no part of it is outside of the matrix."""
    if plain:
        tl.store(out, value)
    else:
        tl.store(out, value, (row < n)[:, None] & (column < m)[None, :])


@triton.jit
def sigmoid_pairs(row, column, n, m, label_offset, pairs):
    """Returns masks of the negatives and of the positives of sigmoid terms, [BLOCK_M, BLOCK_N]."""
    inside = (row < n)[:, None] & (column < m)[None, :]
    positive = column[None, :] == row[:, None] + label_offset
    negative = inside & (positive == 0)
    if pairs.ids is not None:
        equal = clamped(pairs.ids, row, n)[:, None] == clamped(pairs.text_ids, column, m)[None, :]
        negative = negative & (equal == 0)
        if pairs.image_share is not None:
            positive = positive | equal
    return negative, inside & positive


@triton.jit
def sigmoid_amounts(sigmoids, pairs, row, column, n, m, negative, positive, K: tl.constexpr):
    """Returns the factors of term K for the negatives and for the positives, 0 elsewhere."""
    amount = tl.where(negative, tl.load(sigmoids.negative + K), 0.0)
    matched = tl.where(positive, tl.load(sigmoids.positive + K), 0.0)
    if pairs.image_share is not None:
        matched *= clamped(pairs.image_share, row, n)[:, None] + clamped(pairs.text_share, column, m)[None, :]
    return amount, matched


@triton.jit
def sigmoid_entries(
    raw, sigmoids, plain, row, column, n, m, label_offset, pairs, K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Returns the entries of term K for similarities `raw`, their derivatives to the logits, and a factor left out of both.

    A plain tile has only negatives. An entry is NaN where a positive's logit is infinite, though its softplus may be 0.
    """
    signed = raw * tl.load(sigmoids.weight + K) + tl.load(sigmoids.bias + K)  # the logit of a mismatch
    if not plain:
        negative, positive = sigmoid_pairs(row, column, n, m, label_offset, pairs)
        signed = tl.where(positive, -signed, signed)
    value, slope = softplus_and_sigmoid(signed, TILE.INTERPRETED)
    factor = tl.load(sigmoids.negative + K)
    if not plain:
        negative, positive = sigmoid_pairs(row, column, n, m, label_offset, pairs)
        amount, matched = sigmoid_amounts(sigmoids, pairs, row, column, n, m, negative, positive, K)
        taken = amount + matched != 0.0
        value = tl.where(taken, value * (amount + matched), 0.0) + tl.where(matched != 0.0, 0.0 * signed, 0.0)
        slope = tl.where(taken, slope * (amount - matched), 0.0)
        factor = 1.0
    return value, slope, factor


@triton.jit
def softplus_and_sigmoid(x, INTERPRETED: tl.constexpr):
    """log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, by a polynomial with relative error 4e-7; and 1 / (1 + e^-x)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008539198897778988 * e + 0.04408959671854973
    p = p * e - 0.10768166184425354
    p = p * e + 0.17745238542556763
    p = p * e - 0.24495461583137512
    p = p * e + 0.33275479078292847
    p = p * e - 0.4999740421772003
    p = p * e + 0.9999998211860657
    return p * e + tl.maximum(x, 0.0), tl.where(x < 0.0, e, 1.0) * reciprocal(1.0 + e, INTERPRETED)


@triton.jit
def weights(logits, base):
    """Returns 2^(logits - base), 0 where the logit is -inf; base is finite."""
    return tl.exp2(logits - base)


@triton.jit
def weighted(share, value):
    """Returns share * value, 0 where share is 0 even if value is infinite."""
    return tl.where(share == 0.0, 0.0, share * value)


@triton.jit
def raised(maximum, logits, AXIS: tl.constexpr):
    """Returns the running maximum with a tile's logits, a finite base for exponentials, and the factor of earlier sums."""
    maximum_now = tl.maximum(maximum, tl.max(logits, AXIS))
    base = tl.where(maximum_now == -INF, 0.0, maximum_now)
    return maximum_now, base, tl.exp2(maximum - base)
