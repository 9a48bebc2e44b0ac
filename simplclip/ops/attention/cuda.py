"""shaped_attention in CUDA C++, of few tokens: csrc/cuda/attention/."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops import backends
from simplclip.ops.attention.reference import empty_results
from simplclip.ops.attention.sdpa import aligned
from simplclip.ops.backends import Backend, Facts, native

_forward = native("shaped_attention_fwd_cuda", AttentionCall, "(Tensor, Tensor)", empty_results)
# returns each sequence's share of the gains' gradients [B, 3, H]
_backward = native(
    "shaped_attention_bwd_cuda",
    AttentionInto,
    "Tensor",
    lambda call: call.gains.new_empty(call.q.shape[0], *call.gains.shape),
)


class CudaAttention(Backend):
    """Backend "cuda"."""

    name = "cuda"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
        """Returns why the kernels cannot run a call; None if they can."""
        if reason := backends.extension_on_cuda(device, dtype):
            return reason
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
            return (
                "serves float32 only through TF32, which torch does not allow "
                "(torch.backends.cuda.matmul.allow_tf32)"
            )
        reason = backends.cuda_extension.shaped_attention_why_not(
            facts.length, facts.width, dtype == torch.float32
        )
        return reason and f"{reason}; got {facts.length} tokens, width {facts.width}"

    @staticmethod
    def shaped_attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Returns out and the log-sum-exps, as the reference's method."""
        q, k, v = aligned(call.q, call.k, call.v)
        return _forward(replace(call, q=q, k=k, v=v))

    @staticmethod
    def shaped_attention_bwd(call: AttentionInto) -> Tensor:
        """Writes dq, dk and dv, which must be `aligned`; returns the gains' gradients."""
        q, k, v, grad = aligned(call.q, call.k, call.v, call.grad)
        return _backward(replace(call, q=q, k=k, v=v, grad=grad)).sum(0)
