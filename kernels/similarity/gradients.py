"""Gradients of the features as sums of products with blocks of G, and the scaling of G in float16."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.launch import COMPILE, product, started
from simplclip.kernels.similarity.launch import Launch
from simplclip.kernels.similarity.merge import (
    DIAGONAL_IMAGE_TO_TEACHER,
    DIAGONAL_STUDENT,
    DIAGONAL_TEACHER_TO_TEXT,
    LSE_CROSS,
    LSE_STUDENT,
    MEAN_CROSS,
    MEAN_STUDENT,
    SIGMOID,
)

PEAK: tl.constexpr = tl.constexpr(10.0)  # log2 of the largest scaled entry: far from overflow, 2^24 times the least normal
RANGE = {"BLOCK": 2048}


class FeatureGradient:
    """The gradient of features: a float32 sum, to whose rows products with blocks of G are added in place.

    The sum is not bfloat16, since cuBLAS, where it splits a long sum, would add up the parts in bfloat16.
    """

    def __init__(self, like: Tensor, needed: bool = True, dtype: torch.dtype | None = None):  # [N, D]
        self.needed, self.dtype = needed, dtype or like.dtype
        self.sum = like.new_empty(like.shape[0] * needed, like.shape[1], dtype=torch.float32)
        self.begun: set[int] = set()  # the first rows of the ranges that have a product

    def add(self, at: slice, left: Tensor, right: Tensor) -> None:
        """Adds left right to the rows `at`. The ranges of rows of any two calls are equal or disjoint."""
        if not self.needed:
            return
        out, first = self.sum[at], at.start not in self.begun
        self.begun.add(at.start)
        product(out, left, right, add=not first)

    def result(self, back: Tensor | None = None) -> Tensor:  # [N, D] or [0, D]
        """Returns the sum, times `back` if that is given. No call may follow."""
        total, self.sum = self.sum if self.begun else self.sum.zero_(), None
        return (total if back is None else total.mul_(back)).to(self.dtype)


@triton.jit
def _largest(values, STAT: tl.constexpr, size, BLOCK: tl.constexpr):
    """Returns the largest absolute value of a statistic, or of a vector with STAT 0."""
    values += STAT * size.to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(values + at, at < size, 0.0)))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["n", "m"])
def _similarity_range_kernel(
    grad_rows,  # [11, N], None for terms in a sweep without softmaxes
    grad_columns,  # [5, M]
    scale,  # []
    cross_scale,  # []
    sigmoids,  # tile.Sigmoids
    mix,  # [K], of a sweep without softmaxes
    pairs,  # tile.Pairs
    out,  # [2]
    n,
    m,
    LAUNCH: tl.constexpr,  # launch.Launch, of all matrices of the call
    BLOCK: tl.constexpr,
):
    """Writes the power of two that brings a bound of all entries near 2^PEAK, and its reciprocal. One program."""
    bound = 0.0
    if LAUNCH.HAS_IMAGE_TO_TEACHER:
        by = tl.abs(tl.load(cross_scale))
        bound = by * (_largest(grad_rows, LSE_CROSS, n, BLOCK) + _largest(grad_rows, MEAN_CROSS, n, BLOCK))
        bound = tl.maximum(bound, _largest(grad_rows, DIAGONAL_IMAGE_TO_TEACHER, n, BLOCK))
    if LAUNCH.HAS_TEACHER_TO_TEXT:
        of_text = by * (_largest(grad_columns, LSE_CROSS, m, BLOCK) + _largest(grad_columns, MEAN_CROSS, m, BLOCK))
        bound = tl.maximum(bound, tl.maximum(of_text, _largest(grad_rows, DIAGONAL_TEACHER_TO_TEXT, n, BLOCK)))
    if LAUNCH.HAS_STUDENT:
        student = 0.0
        if grad_rows is not None:
            student = _largest(grad_rows, LSE_STUDENT, n, BLOCK)
            if LAUNCH.RELATIONAL:
                student += _largest(grad_rows, MEAN_STUDENT, n, BLOCK)
            if LAUNCH.COLUMNS:
                student += _largest(grad_columns, LSE_STUDENT, m, BLOCK)
                if LAUNCH.RELATIONAL:
                    student += _largest(grad_columns, MEAN_STUDENT, m, BLOCK)
            student *= tl.abs(tl.load(scale))
            student = tl.maximum(student, _largest(grad_rows, DIAGONAL_STUDENT, n, BLOCK))
        SIGMOIDS: tl.constexpr = LAUNCH.SIGMOIDS
        for k in tl.static_range(SIGMOIDS):
            positive = tl.abs(tl.load(sigmoids.positive + k))
            if pairs.image_share is not None:
                positive *= _largest(pairs.image_share, 0, n, BLOCK) + _largest(pairs.text_share, 0, m, BLOCK)
            entry = tl.abs(tl.load(sigmoids.weight + k)) * tl.maximum(tl.abs(tl.load(sigmoids.negative + k)), positive)
            if grad_rows is None:
                student += entry * tl.abs(tl.load(mix + k))
            else:
                student += entry * _largest(grad_rows, SIGMOID + k, n, BLOCK)
        bound = tl.maximum(bound, student)
    power = tl.minimum(tl.maximum(PEAK - tl.ceil(tl.log2(bound)), -100.0), 100.0)
    tl.store(out, tl.exp2(power))
    tl.store(out + 1, tl.exp2(-power))


def range_factor(image: Tensor, launch: Launch, **arguments: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the power of two by which float16 matrices are multiplied before they are rounded, and its reciprocal.

    With a mean over N rows, G has entries of about s/N² for a scale s, below float16's least number, 2^-24, from
    N = 4,096 √s on. No value is read from the device.
    """
    if image.dtype != torch.float16:
        return None, None
    out = torch.empty(2, dtype=torch.float32, device=image.device)
    started(_similarity_range_kernel)[(1,)](**arguments, out=out, LAUNCH=launch, **RANGE, num_warps=8, **COMPILE)
    return out[0], out[1]
