"""The second half of parallel_mlp in plain torch, from the hidden layer before its activation to
the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.ops.backends import Reference

aten = torch.ops.aten


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quickgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda grad, x: aten.gelu_backward(grad, x, approximate="none"),
    "gelu_tanh": lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    # x sigmoid(a x) is silu(a x) / a
    "quickgelu": lambda grad, x: aten.silu_backward(grad, 1.702 * x),
    "relu": lambda grad, x: aten.threshold_backward(grad, x, 0),
    "silu": aten.silu_backward,
}


class ReferenceMlp(Reference):
    """Backend "reference"."""

    @staticmethod
    def parallel_mlp_fwd(call: HiddenCall) -> None:
        """Writes act(h) weightᵀ + bias to call.out [T, C], or adds it if call.accumulate."""
        product = F.linear(ACTIVATIONS[call.act](call.h), call.weight, call.bias)
        if call.accumulate:
            call.out.add_(product)
        else:
            call.out.copy_(product)

    @staticmethod
    def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:  # [C, F], or [0, F]
        """Overwrites h by dh = (grad weight) ∘ act'(h); returns dweight = gradᵀ act(h)."""
        grad = call.grad
        h = call.h
        weight = call.weight
        if call.need_weight:
            d_weight = grad.T @ ACTIVATIONS[call.act](h)
        else:
            d_weight = weight.new_empty(0, weight.shape[1])
        h.copy_(_BACKWARD[call.act](grad @ weight, h))
        return d_weight
