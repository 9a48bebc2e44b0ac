"""A cast of float16 features to float32, whose gradient stays in float16's range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Widen(torch.autograd.Function):
    """A cast of float16 to float32.

    The gradient of a row of zeros, which 1/eps makes too large, is clamped to float16's range; the
    gradients of other rows may overflow, as GradScaler expects.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Returns the float16 rows [N, D] in float32; saves which rows are not all zero."""
        ctx.save_for_backward(value.any(-1, keepdim=True))
        return value.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns the gradient in float16; in rows of zeros it is clamped to float16's range."""
        (nonzero,) = ctx.saved_tensors
        most = torch.finfo(torch.float16).max
        return torch.where(nonzero, gradient, gradient.clamp(-most, most)).half()


def widen(features: Tensor) -> Tensor:
    """Returns float16 features [N, D] in float32, others as they are, for F.normalize.

    Its eps, 1e-12, is outside of float16's range, and the gradient of a row of zeros is multiplied
    by 1/eps; backward clamps it to float16's range.
    """
    return _Widen.apply(features) if features.dtype == torch.float16 else features
