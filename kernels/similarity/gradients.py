"""Gradients of the features as sums of products with G, which halves add in float32; and the range of G in float16."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels.similarity.launch import Call, Launch
from simplclip.ops.similarity.call import ColumnStat, RowStat

_FLOAT16_PEAK = 10  # log2: far from overflow, and 2^24 times what float16 still holds in full


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
    """Gradient of rows that each chunk has to itself: one product is rounded as it comes, several are added first."""

    def __init__(self, like: Tensor, planes: int, needed: bool = True):  # [N, D]
        self.needed, self.planes, self.sum = needed, planes, None
        self.out = torch.zeros_like(like) if needed and planes == 0 else like.new_empty(like.shape[0] * needed, like.shape[1])

    def add(self, at: slice, left: Tensor, right: Tensor, factor: Tensor | None) -> None:
        if not self.needed:
            return
        if self.planes == 1 and factor is None:
            torch.mm(left, right, out=self.out[at])
        else:
            self.add_product(at, wide_product(left, right, factor))

    def add_product(self, at: slice, product: Tensor) -> None:  # [rows, D] float32, which may be overwritten
        if self.needed:
            self.sum = product if self.sum is None else self.sum.add_(product)

    def flush(self, at: slice) -> None:
        if self.sum is not None:
            self.out[at], self.sum = self.sum, None

    def result(self) -> Tensor:
        return self.out


class TextGradient:
    """Gradient to which every chunk adds: in the features' dtype if a single product makes it up, else in float32."""

    def __init__(self, like: Tensor, products: int, needed: bool = True):  # [M, D]
        self.like, self.products, self.needed, self.sum = like, products, needed, None

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
            return self.like.new_empty(0, self.like.shape[1])
        return torch.zeros_like(self.like) if self.sum is None else self.sum.to(self.like.dtype)


def range_factors(
    call: Call,
    launch: Launch,
    grad_rows: Tensor,  # [12, N]
    grad_columns: Tensor,  # [6, M]
) -> Tensor | None:  # [planes] float32
    """Powers of two by which float16 planes are multiplied before they are rounded; None for other dtypes.

    A mean over N rows has entries of G of 1/N² in it, below float16's range already at N = 32,768. No value is read here.
    """
    if call.image.dtype != torch.float16:
        return None
    rows, columns = grad_rows.abs().amax(1), grad_columns.abs().amax(1) * launch.COLUMNS
    match = rows[RowStat.MATCH] + columns[ColumnStat.MATCH] * launch.HARD
    bounds = []
    if launch.Z:
        z = (rows[RowStat.LSE_Z] + columns[ColumnStat.LSE_Z]) * launch.SOFTMAX
        z = call.scale.abs() * (z + (rows[RowStat.MEAN_Z] + columns[ColumnStat.MEAN_Z]) * launch.RELATIONAL)
        if (launch.ALL or launch.HARD) and not launch.L:
            z = z + call.plane_weight.abs() * match
        bounds.append(torch.maximum(z, rows[RowStat.DIAGONAL_Z]))
    if launch.L:
        bounds.append(torch.maximum(match, rows[RowStat.DIAGONAL_L]))
    if launch.U:
        u = call.cross_scale.abs() * (rows[RowStat.LSE_U] + rows[RowStat.MEAN_U] * launch.KL)
        bounds.append(torch.maximum(u, rows[RowStat.DIAGONAL_U]))
    if launch.V:
        v = call.cross_scale.abs() * (columns[ColumnStat.LSE_V] + columns[ColumnStat.MEAN_V] * launch.KL)
        bounds.append(torch.maximum(v, rows[RowStat.DIAGONAL_V]))
    return torch.exp2((_FLOAT16_PEAK - torch.stack(bounds).log2().ceil()).clamp(-100, 100))
