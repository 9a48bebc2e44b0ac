"""The second half of parallel_mlp in plain torch, from the hidden layer before its activation to
the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.mlp import HiddenCall, HiddenGradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quickgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def parallel_mlp_fwd(call: HiddenCall) -> None:
    """Writes act(h) weightᵀ + bias to call.out [T, C], or adds it if call.accumulate."""
    product = F.linear(ACTIVATIONS[call.act](call.h), call.weight, call.bias)
    if call.accumulate:
        call.out.add_(product)
    else:
        call.out.copy_(product)


def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:  # [C, F], or [0, F]
    """Overwrites h by dh = (grad weight) ∘ act'(h); returns dweight = gradᵀ act(h)."""
    grad = call.grad
    with torch.enable_grad():
        h = call.h.detach().requires_grad_()
        activated = ACTIVATIONS[call.act](h)
    if call.need_weight:
        d_weight = grad.T @ activated.detach()
    else:
        d_weight = grad.new_empty(0, call.weight.shape[1])
    (d_h,) = torch.autograd.grad(activated, h, grad @ call.weight)
    call.h.copy_(d_h)
    return d_weight
