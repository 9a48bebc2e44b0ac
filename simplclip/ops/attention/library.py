"""shaped_attention with the softmax attention of another library, whose result A v is kept.

All gradients of ordinary attention are linear in the incoming gradient dO, so that each is
multiplied by the head's beta afterwards. The other terms are computed in the dtype of sums, by
Triton kernels where these run, elsewhere by plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops.backends import why_not_triton

Call = TypeVar("Call", bound=AttentionCall)
Attention = Callable[[AttentionCall], tuple[Tensor, Tensor]]
Gradients = Callable[[AttentionInto], tuple[Tensor, Tensor, Tensor]]


def _on_triton(call: AttentionCall) -> bool:
    """Whether the Triton kernels of kernels/attention compute all but the softmax attention."""
    return why_not_triton(call.q.device, call.q.dtype) is None


def _padding_mask(call: AttentionCall) -> Tensor | None:  # [B, L, 1, 1]
    """Returns which tokens are padding; None if the call has no lengths."""
    if call.lengths is None:
        return None
    positions = torch.arange(call.q.shape[1], device=call.q.device)
    return (positions >= call.lengths[:, None])[:, :, None, None]


def _visible_keys(call: AttentionCall) -> Tensor | int:  # [L, 1, 1], [B, 1, 1, 1] or a number
    """Returns how many keys a query sees, at least 1, to divide tensors [B, L, H, K] by."""
    length = call.q.shape[1]
    if call.causal:
        counts = torch.arange(1, length + 1, device=call.q.device, dtype=call.gains.dtype)
        return counts[:, None, None]
    if call.lengths is None:
        return length
    return call.lengths.clamp(min=1)[:, None, None, None]


# [B, 1, H, K], if causal [B, L, H, K]
def _uniform_attention(v: Tensor, call: AttentionCall) -> Tensor:
    """Returns C v, the mean of v (0 at padded tokens) over the keys that a query sees."""
    dtype = call.gains.dtype
    if call.causal:
        return v.cumsum(1, dtype=dtype).div_(_visible_keys(call))
    return v.sum(1, keepdim=True, dtype=dtype).div_(_visible_keys(call))


# [B, 1, H, K], if causal [B, L, H, K]
def _uniform_attention_transposed(grad: Tensor, call: AttentionCall) -> Tensor:
    """Returns Cᵀ grad, of the same C; grad: [B, L, H, K], 0 at padded tokens."""
    if not call.causal:
        return grad.sum(1, keepdim=True, dtype=call.gains.dtype).div_(_visible_keys(call))
    shares = grad / _visible_keys(call)
    return (shares.sum(1, keepdim=True) - shares.cumsum(1)).add_(shares)


# [B, L, H, K] twice -> [H]
def _product_per_head(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum of a ∘ b over all but the heads, accumulated in `dtype`."""
    if a.dtype == torch.float16:  # in which products overflow
        a = a.to(dtype)
    return (a * b).sum((0, 1, 3), dtype=dtype)


def _with_positive_scale(call: Call) -> tuple[Call, int]:
    """Returns a call with equal logits and scale > 0, as masks by −inf need, and the sign of dq."""
    if call.scale > 0:
        return call, 1
    if call.scale < 0:
        return replace(call, q=-call.q, scale=-call.scale), -1
    return replace(call, q=torch.zeros_like(call.q), scale=1.0), 0


def _write_terms(call: AttentionCall, av: Tensor, out: Tensor) -> None:
    """Writes alpha v + beta A v − gamma C v to `out`, whose padded tokens are not zeroed."""
    alpha, beta, gamma = call.gains[:, :, None]
    torch.addcmul(-gamma * _uniform_attention(call.v, call), call.v, alpha, out=out)
    out.addcmul_(av, beta)


def _gradients_without_softmax(call: AttentionInto) -> Tensor:  # [3, H]
    """Writes alpha grad − gamma Cᵀ grad to call.dv; returns the gains' gradients."""
    alpha, _, gamma = call.gains[:, :, None]
    dtype = call.gains.dtype
    d_uniform = _uniform_attention_transposed(call.grad, call)
    v = call.v if call.causal else call.v.sum(1, keepdim=True, dtype=dtype)
    d_gamma = (d_uniform * v).sum((0, 1, 3))
    d_alpha = _product_per_head(call.grad, call.v, dtype)
    d_beta = _product_per_head(call.grad, call.av, dtype)
    torch.addcmul(d_uniform.mul_(-gamma), call.grad, alpha, out=call.dv)
    return torch.stack([d_alpha, d_beta, -d_gamma])


def forward(attention: Attention, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out and log-sum-exps [B, H, L], 0 at padding, and A v [B, L, H, K].

    attention(call): returns A v [B, L, H, K], A = softmax(q kᵀ scale), and log-sum-exps [B, H, L]
    of q kᵀ scale. It honours the call's `causal` and `lengths`; both results are arbitrary at
    padded tokens. The call's `gains` are not used.
    """
    out = call.q.new_empty(call.q.shape)
    padding = _padding_mask(call)
    av, lse = attention(_with_positive_scale(call)[0])
    if padding is not None:
        lse = lse.masked_fill(padding[:, None, :, 0, 0], 0)
    if _on_triton(call):
        from simplclip.kernels.attention import launch

        launch.shaped_attention_terms(call, av, out)
        return out, lse.contiguous(), av.contiguous()
    if padding is not None:
        av = av.masked_fill(padding, 0)
        call = replace(call, v=call.v.masked_fill(padding, 0))
    _write_terms(call, av, out)
    if padding is not None:
        out.masked_fill_(padding, 0)
    return out, lse.contiguous(), av.contiguous()


def backward(attention: Attention, gradients: Gradients, call: AttentionInto) -> Tensor:  # [3, H]
    """Overwrites call.dq, call.dk and call.dv; returns the gradients of alpha, beta and gamma.

    With dO = call.grad, the softmax attention A and the uniform attention C:
    dv = alpha dO + beta Aᵀ dO − gamma Cᵀ dO; dalpha = Σ dO v, dbeta = Σ dO A v,
    dgamma = −Σ v Cᵀ dO. If call.av is empty, forward runs again.

    attention: as of `forward`. gradients(call): returns the gradients dq, dk and dv = Aᵀ grad of
    ordinary attention A v, [B, L, H, K]. The gains are not used, call.av is needed, and the call's
    dq, dk and dv are not written. Values at padded tokens are arbitrary.
    """
    on_triton = _on_triton(call)
    padding = None if on_triton else _padding_mask(call)
    if padding is not None:
        v = call.v.masked_fill(padding, 0)
        call = replace(call, v=v, grad=call.grad.masked_fill(padding, 0))
    call, sign = _with_positive_scale(call)
    if not call.av.numel():  # forward did not keep A v
        av, lse = attention(call)
        if padding is not None:
            av = av.masked_fill(padding, 0)
        call = replace(call, av=av, lse=lse)
    if on_triton:
        from simplclip.kernels.attention import launch

        return launch.shaped_attention_gradients(call, gradients(call), sign)
    d_gains = _gradients_without_softmax(call)
    dq, dk, dv = gradients(call)
    beta = call.gains[1, :, None]
    torch.mul(dq, sign * beta, out=call.dq)
    torch.mul(dk, beta, out=call.dk)
    call.dv.addcmul_(dv, beta)
    if padding is not None:
        for gradient in (call.dq, call.dk, call.dv):
            gradient.masked_fill_(padding, 0)
    return d_gains
