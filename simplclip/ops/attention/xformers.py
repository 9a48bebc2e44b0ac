"""memory_efficient_attention of the package xformers, which picks its kernel itself."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops.attention import library
from simplclip.ops.attention.sdpa import aligned


def _options(call: AttentionCall) -> dict[str, Any]:
    """Returns xformers' keyword arguments: attn_bias (a causal mask or None) and scale."""
    from xformers.ops import LowerTriangularMask

    return {"attn_bias": LowerTriangularMask() if call.causal else None, "scale": call.scale}


def _attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v and the log-sum-exps, see library.forward; the call has no `lengths`."""
    from xformers.ops import fmha

    q, k, v = aligned(call.q, call.k, call.v)
    av, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, **_options(call))
    length, width = call.q.shape[1::2]
    return av[..., :width], lse[:, :, :length].contiguous()  # some kernels pad the log-sum-exps


def _gradients(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv of ordinary attention, see library.backward."""
    from xformers.ops import fmha

    grad, av, *inputs = aligned(call.grad, call.av, call.q, call.k, call.v)
    gradients = fmha.memory_efficient_attention_backward(
        grad, av, call.lse, *inputs, **_options(call)
    )
    return tuple(t[..., : call.q.shape[3]] for t in gradients)


shaped_attention_fwd = partial(library.forward, _attention)
shaped_attention_bwd = partial(library.backward, _attention, _gradients)
