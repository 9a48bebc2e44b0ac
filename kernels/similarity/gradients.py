"""Gradients of the features as sums of products with G (in float32 for half types), and the scaling of G in float16."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels.similarity.launch import Launch
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityGradient

FLOAT16_PEAK = 10  # log2 of the largest scaled entry: far from overflow, and 2^24 times the smallest normal float16


def wide_product(left: Tensor, right: Tensor, factor: Tensor | None = None) -> Tensor:
    """factor left right in float32."""
    if left.dtype == torch.float32:
        out = torch.mm(left, right)
    elif left.is_cuda:
        out = torch.mm(left, right, out_dtype=torch.float32)
    else:  # under Triton's interpreter
        out = torch.mm(left.float(), right.float())
    return out if factor is None else out.mul_(factor)


class ImageGradient:
    """The images' gradient, of which each chunk has its own rows: a single product is rounded at once, several are added."""

    def __init__(self, like: Tensor, matrices: int, needed: bool = True, dtype: torch.dtype | None = None):  # [N, D]
        self.needed, self.matrices, self.sum = needed, matrices, None
        make = like.new_zeros if needed and matrices == 0 else like.new_empty
        self.out = make(like.shape[0] * needed, like.shape[1], dtype=dtype)

    def add(self, at: slice, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
        if not self.needed:
            return
        if self.matrices == 1 and factor is None:
            torch.mm(left, right, out=self.out[at])
        else:
            product = wide_product(left, right, factor)
            self.sum = product if self.sum is None else self.sum.add_(product)

    def flush(self, at: slice) -> None:
        if self.sum is not None:
            self.out[at], self.sum = self.sum, None

    def result(self) -> Tensor:
        return self.out


class TextGradient:
    """The gradient of the texts, to which every chunk adds. In the features' dtype if one product is all, else in float32."""

    def __init__(self, like: Tensor, products: int, needed: bool = True, dtype: torch.dtype | None = None):  # [M, D]
        self.like, self.products, self.needed, self.sum = like, products, needed, None
        self.dtype = dtype or like.dtype

    def add(self, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
        if not self.needed:
            return
        if self.products == 1 and factor is None:
            self.sum = torch.mm(left, right)
        elif self.sum is None:
            self.sum = wide_product(left, right, factor)
        elif left.dtype == torch.float32 and factor is None:
            self.sum.addmm_(left, right)
        else:
            self.sum.add_(wide_product(left, right, factor))

    def result(self) -> Tensor:
        if not self.needed:
            return self.like.new_empty(0, self.like.shape[1], dtype=self.dtype)
        return torch.zeros_like(self.like, dtype=self.dtype) if self.sum is None else self.sum.to(self.dtype)


def sigmoid_bounds(
    weight: Tensor, negative: Tensor, positive: Tensor, image_share: Tensor | None, text_share: Tensor | None
) -> Tensor:  # [K] each
    """The largest derivative of an entry of each sigmoid term with respect to the similarity."""
    positive = positive.abs() if image_share is None else positive.abs() * (image_share.amax() + text_share.amax())
    return weight.abs() * torch.maximum(negative.abs(), positive)


def range_factors(call: SimilarityGradient, launch: Launch) -> Tensor | None:  # [matrices] float32
    """Powers of two by which float16 matrices are multiplied before they are rounded; None for other dtypes.

    With a mean over N rows G has entries of 1/N², below float16's range from N = 32,768 on. No value is read from the device.
    """
    if call.image.dtype != torch.float16:
        return None
    rows, columns = call.grad_rows.abs().amax(1), call.grad_columns.abs().amax(1) * launch.COLUMNS
    bounds = []
    if launch.HAS_STUDENT:
        bound = rows[RowStat.LSE_STUDENT] + columns[ColumnStat.LSE_STUDENT]
        means = rows[RowStat.MEAN_STUDENT] + columns[ColumnStat.MEAN_STUDENT]
        bound = call.scale.abs() * (bound + means * launch.RELATIONAL)
        bound = torch.maximum(bound, rows[RowStat.DIAGONAL_STUDENT])
        if call.sigmoids:
            entries = sigmoid_bounds(
                call.sigmoid_weight, call.sigmoid_negative, call.sigmoid_positive, call.image_share, call.text_share
            )
            bound = bound + (entries * rows[RowStat.SIGMOID : RowStat.SIGMOID + call.sigmoids]).sum()
        bounds.append(bound)
    if launch.HAS_IMAGE_TO_TEACHER:
        bound = rows[RowStat.LSE_IMAGE_TO_TEACHER] + rows[RowStat.MEAN_IMAGE_TO_TEACHER]
        bounds.append(torch.maximum(call.cross_scale.abs() * bound, rows[RowStat.DIAGONAL_IMAGE_TO_TEACHER]))
    if launch.HAS_TEACHER_TO_TEXT:
        bound = columns[ColumnStat.LSE_TEACHER_TO_TEXT] + columns[ColumnStat.MEAN_TEACHER_TO_TEXT]
        bounds.append(torch.maximum(call.cross_scale.abs() * bound, rows[RowStat.DIAGONAL_TEACHER_TO_TEXT]))
    return torch.exp2((FLOAT16_PEAK - torch.stack(bounds).log2().ceil()).clamp(-100, 100))
