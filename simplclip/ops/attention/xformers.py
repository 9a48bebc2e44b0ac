"""memory_efficient_attention of the package xformers as an attention for
with_library_attention.py; xformers picks its kernel itself."""

from __future__ import annotations

from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops.attention.sdpa import aligned


def _options(call: AttentionCall) -> dict:
    """Returns xformers' keyword arguments: attn_bias (a causal mask or None) and scale."""
    from xformers.ops import LowerTriangularMask

    return {"attn_bias": LowerTriangularMask() if call.causal else None, "scale": call.scale}


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v [B, L, H, K] and the log-sum-exps [B, H, L] of A = softmax(q kᵀ scale).

    It honours `causal`; the call must have no `lengths`. The gains are not used. Imports xformers.
    """
    from xformers.ops import fmha

    q, k, v = aligned(call.q, call.k, call.v)
    av, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, **_options(call))
    length, width = call.q.shape[1::2]
    return av[..., :width], lse[:, :, :length].contiguous()  # some kernels pad the log-sum-exps


def attention_backward(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients dq, dk and dv = Aᵀ grad of ordinary attention A v, [B, L, H, K] each.

    A = softmax(q kᵀ scale). The gains are not used, call.av is needed, and the call's dq, dk and dv
    are not written. Imports xformers.
    """
    from xformers.ops import fmha

    grad, av, *inputs = aligned(call.grad, call.av, call.q, call.k, call.v)
    gradients = fmha.memory_efficient_attention_backward(
        grad, av, call.lse, *inputs, **_options(call)
    )
    return tuple(t[..., : call.q.shape[3]] for t in gradients)
