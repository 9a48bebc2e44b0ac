"""A cast of float16 features to float32, whose gradient stays in float16's range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Widen(torch.autograd.Function):
    """A cast of float16 to float32; gradients of rows of zeros are clamped to float16's range."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value.any(-1, keepdim=True))
        return value.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (nonzero,) = ctx.saved_tensors
        most = torch.finfo(torch.float16).max
        return torch.where(nonzero, gradient, gradient.clamp(-most, most)).half()


def widen(features: Tensor) -> Tensor:
    """Returns float16 features [N, D] in float32, others as they are, for F.normalize.

    Its eps, 1e-12, is beyond float16, as is 1/eps times the gradient of a row of zeros: clamped.
    """
    return _Widen.apply(features) if features.dtype == torch.float16 else features
