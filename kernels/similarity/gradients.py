"""Gradients of the features as sums of products with blocks of G, and the scaling of G in float16."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels.launch import product
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityGradient

FLOAT16_PEAK = 10  # log2 of the largest scaled entry: far from overflow, and 2^24 times the smallest normal float16


class FeatureGradient:
    """The gradient of features: float32 sums of products with blocks of G, to each of which a product is added in place.

    A bfloat16 result would be added up from parts in bfloat16 where cuBLAS splits a long sum.
    """

    def __init__(self, like: Tensor, needed: bool = True, dtype: torch.dtype | None = None):  # [N, D]
        self.needed, self.dtype = needed, dtype or like.dtype
        self.sum = like.new_empty(like.shape[0] * needed, like.shape[1], dtype=torch.float32)
        self.begun: set[int] = set()  # the first rows of the ranges that have a product

    def add(self, at: slice, left: Tensor, right: Tensor) -> None:
        """Adds left right to these rows, whose range is the same in each call or another one apart from it."""
        if not self.needed:
            return
        out, first = self.sum[at], at.start not in self.begun
        self.begun.add(at.start)
        product(out, left, right, add=not first)

    def result(self, back: Tensor | None = None) -> Tensor:  # [N, D] or [0, D]
        """The sum, times `back` if it is given. It is the last call."""
        total, self.sum = self.sum if self.begun else self.sum.zero_(), None
        return (total if back is None else total.mul_(back)).to(self.dtype)


def sigmoid_bounds(
    weight: Tensor, negative: Tensor, positive: Tensor, image_share: Tensor | None, text_share: Tensor | None
) -> Tensor:  # [K] each
    """The largest derivative of an entry of each sigmoid term with respect to the similarity."""
    positive = positive.abs() if image_share is None else positive.abs() * (image_share.amax() + text_share.amax())
    return weight.abs() * torch.maximum(negative.abs(), positive)


def range_factor(call: SimilarityGradient) -> Tensor | None:  # [] float32
    """The power of two by which float16 matrices are multiplied before they are rounded; None for other dtypes.

    With a mean over N rows G has entries of 1/N², below float16's range from N = 32,768 on. No value is read from the device.
    """
    if call.image.dtype != torch.float16:
        return None
    rows, columns = call.grad_rows.abs().amax(1), call.grad_columns.abs().amax(1) * call.columns
    bounds = []
    if call.softmax:
        bound = rows[RowStat.LSE_STUDENT] + columns[ColumnStat.LSE_STUDENT]
        means = rows[RowStat.MEAN_STUDENT] + columns[ColumnStat.MEAN_STUDENT]
        bound = call.scale.abs() * (bound + means * call.relational)
        bound = torch.maximum(bound, rows[RowStat.DIAGONAL_STUDENT])
        if call.sigmoids:
            entries = sigmoid_bounds(
                call.sigmoid_weight, call.sigmoid_negative, call.sigmoid_positive, call.image_share, call.text_share
            )
            bound = bound + (entries * rows[RowStat.SIGMOID : RowStat.SIGMOID + call.sigmoids]).sum()
        bounds.append(bound)
    if call.interactive:
        bound = rows[RowStat.LSE_IMAGE_TO_TEACHER] + rows[RowStat.MEAN_IMAGE_TO_TEACHER]
        bounds.append(torch.maximum(call.cross_scale.abs() * bound, rows[RowStat.DIAGONAL_IMAGE_TO_TEACHER]))
    if call.has_teacher_to_text:
        bound = columns[ColumnStat.LSE_TEACHER_TO_TEXT] + columns[ColumnStat.MEAN_TEACHER_TO_TEXT]
        bounds.append(torch.maximum(call.cross_scale.abs() * bound, rows[RowStat.DIAGONAL_TEACHER_TO_TEXT]))
    return torch.exp2((FLOAT16_PEAK - torch.stack(bounds).amax().log2().ceil()).clamp(-100, 100))
