"""shaped_attention in CUDA C++, of few tokens: csrc/cuda/attention/."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops.attention.sdpa import aligned
from simplclip.ops.native import native

_forward = native("shaped_attention_fwd_cuda", AttentionCall, "(Tensor, Tensor)")
# returns each sequence's share of the gains' gradients [B, 3, H]
_backward = native("shaped_attention_bwd_cuda", AttentionInto, "Tensor")


def shaped_attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns out and the log-sum-exps, as the reference's function."""
    q, k, v = aligned(call.q, call.k, call.v)
    return _forward(replace(call, q=q, k=k, v=v))


def shaped_attention_bwd(call: AttentionInto) -> Tensor:
    """Writes dq, dk and dv, which must be `aligned`; returns the gains' gradients."""
    q, k, v, grad = aligned(call.q, call.k, call.v, call.grad)
    return _backward(replace(call, q=q, k=k, v=v, grad=grad)).sum(0)
