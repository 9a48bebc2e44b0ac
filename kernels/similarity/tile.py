"""Helpers of similarity_loss's forward and backward kernels: a tile of a product, its negatives, stable functions."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.arithmetic import INF, LOG2E, dot, sigmoid
from simplclip.ops.similarity.call import SigmoidCall, SimilarityCall


class Pairs(NamedTuple):
    """An argument of the kernels: which columns belong to a row beside its own pair, and the positives' shares."""

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
    """left rightᵀ of some rows and columns."""
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
        tile = dot(a, b, tile, PRECISION, TILE.INTERPRETED)
        left_at += TILE.BLOCK_K
        right_at += TILE.BLOCK_K
    return tile


@triton.jit
def ids_of_rows(pairs, safe_row):  # [BLOCK_M] int64, or None without ids
    row_ids = None
    if pairs.ids is not None:
        row_ids = tl.load(pairs.ids + safe_row)
    return row_ids


@triton.jit
def negatives(t, row, column, row_inside, m, label_offset, row_ids, pairs, safe_column, DROP_IDS: tl.constexpr):
    """The mask of a softmax's negatives [BLOCK_M, BLOCK_N]: inside the matrix, not the positive, and not with the row's id.

    With the teacher's logits t, which are -inf elsewhere, the mask needs no registers besides theirs.
    """
    if t is not None:
        negative = t != -INF
    else:
        negative = row_inside[:, None] & (column < m)[None, :] & (column[None, :] != row[:, None] + label_offset)
        if DROP_IDS:
            negative = negative & (row_ids[:, None] != tl.load(pairs.text_ids + safe_column)[None, :])
    return negative


@triton.jit
def sigmoid_pairs(row, column, inside, label_offset, pairs, safe_row, safe_column):
    """Masks of the negatives and of the positives of sigmoid terms, [BLOCK_M, BLOCK_N]."""
    positive = column[None, :] == row[:, None] + label_offset
    negative = inside & (positive == 0)
    if pairs.ids is not None:
        equal = tl.load(pairs.ids + safe_row)[:, None] == tl.load(pairs.text_ids + safe_column)[None, :]
        negative = negative & (equal == 0)
        if pairs.image_share is not None:
            positive = positive | equal
    return negative, inside & positive


@triton.jit
def sigmoid_logits(similarity, sigmoids, pairs, safe_row, safe_column, negative, positive, K: tl.constexpr):
    """Of term K: the logits of a mismatch, which are -l of a positive, and the amounts of negatives and positives, else 0."""
    l = similarity * tl.load(sigmoids.weight + K) + tl.load(sigmoids.bias + K)
    amount = tl.where(negative, tl.load(sigmoids.negative + K), 0.0)
    matched = tl.where(positive, tl.load(sigmoids.positive + K), 0.0)
    if pairs.image_share is not None:
        matched *= tl.load(pairs.image_share + safe_row)[:, None] + tl.load(pairs.text_share + safe_column)[None, :]
    return tl.where(positive, -l, l), amount, matched


@triton.jit
def sigmoid_values(signed, amount, matched):
    """The entries of a term; NaN where a positive's logit is infinite, though its softplus may be 0."""
    value = tl.where(amount + matched != 0.0, softplus(signed) * (amount + matched), 0.0)
    return value + tl.where(matched != 0.0, 0.0 * signed, 0.0)


@triton.jit
def sigmoid_slopes(signed, amount, matched):
    """The derivatives of the entries with respect to l."""
    return tl.where(amount + matched != 0.0, sigmoid(signed) * (amount - matched), 0.0)


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, by a polynomial with relative error 4e-7."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.008539198897778988 * e + 0.04408959671854973
    p = p * e - 0.10768166184425354
    p = p * e + 0.17745238542556763
    p = p * e - 0.24495461583137512
    p = p * e + 0.33275479078292847
    p = p * e - 0.4999740421772003
    p = p * e + 0.9999998211860657
    return p * e + tl.maximum(x, 0.0)


@triton.jit
def weights(logits, base):
    """2^(logits - base), 0 where the logit is -inf; base is finite."""
    return tl.exp2(logits - base)


@triton.jit
def weighted(share, value):
    """share * value, 0 where share is 0 even if value is infinite."""
    return tl.where(share == 0.0, 0.0, share * value)


@triton.jit
def raised(maximum, logits, AXIS: tl.constexpr):
    """The running maximum with a tile's logits, a finite base for exponentials, and the factor of earlier sums."""
    maximum_now = tl.maximum(maximum, tl.max(logits, AXIS))
    base = tl.where(maximum_now == -INF, 0.0, maximum_now)
    return maximum_now, base, tl.exp2(maximum - base)
