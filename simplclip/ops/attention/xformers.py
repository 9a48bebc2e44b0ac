"""memory_efficient_attention of the package xformers, which picks its kernel itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops import backends
from simplclip.ops.attention.library import LibraryAttention
from simplclip.ops.attention.sdpa import aligned
from simplclip.ops.backends import Facts


def _options(call: AttentionCall) -> dict[str, Any]:
    """Returns xformers' keyword arguments: attn_bias (a causal mask or None) and scale."""
    from xformers.ops import LowerTriangularMask

    return {"attn_bias": LowerTriangularMask() if call.causal else None, "scale": call.scale}


class XformersAttention(LibraryAttention):
    """Backend "xformers"."""

    name = "xformers"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
        """Returns why xformers cannot run a call; None if it can."""
        if not backends.installed("xformers"):
            return "the package xformers is not installed"
        if facts.lengths:
            return "takes lengths only as a list on the host"
        return backends.why_not_kernels("cuda", device, dtype)

    @staticmethod
    def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Returns A v and the log-sum-exps, see LibraryAttention; the call has no `lengths`."""
        from xformers.ops import fmha

        q, k, v = aligned(call.q, call.k, call.v)
        av, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, **_options(call))
        length, width = call.q.shape[1::2]
        return av[..., :width], lse[:, :, :length].contiguous()  # some kernels pad the log-sum-exps

    @staticmethod
    def attention_backward(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk and dv of ordinary attention, see LibraryAttention."""
        from xformers.ops import fmha

        grad, av, *inputs = aligned(call.grad, call.av, call.q, call.k, call.v)
        gradients = fmha.memory_efficient_attention_backward(
            grad, av, call.lse, *inputs, **_options(call)
        )
        return tuple(t[..., : call.q.shape[3]] for t in gradients)
