"""shaped_attention around a softmax attention of another library, whose result A v is kept for backward.

An attention is two functions. Forward maps a call to A v [B, L, H, K] and the log-sum-exps [B, H, L]. Backward maps a call
with A v and the incoming gradient dO to the gradients of ordinary attention: dq, dk and Aᵀ dO. All three are linear in dO, so
that each is multiplied by the head's beta afterwards. The other terms are computed in the dtype of sums, by Triton kernels
where these run, elsewhere by plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.attention.call import AttentionCall, AttentionInto

Forward = Callable[[AttentionCall], tuple[Tensor, Tensor]]
Call = TypeVar("Call", bound=AttentionCall)
Backward = Callable[[AttentionInto], tuple[Tensor, Tensor, Tensor]]


def _fused(call: AttentionCall) -> bool:
    """Whether the Triton kernels of kernels/attention compute the terms besides the softmax attention."""
    return backends.triton_on_cuda(call.q.device, call.q.dtype) is None


def _padded(call: AttentionCall) -> Tensor | None:  # [B, L, 1, 1]
    """Returns which tokens are padding; None without lengths."""
    if call.lengths is None:
        return None
    return (torch.arange(call.q.shape[1], device=call.q.device) >= call.lengths[:, None])[:, :, None, None]


def _counts(call: AttentionCall) -> Tensor | int:  # [L, 1, 1], [B, 1, 1, 1] or a number
    """Returns how many keys a query sees, at least 1."""
    if call.causal:
        return torch.arange(1, call.q.shape[1] + 1, device=call.q.device, dtype=call.gains.dtype)[:, None, None]
    return call.q.shape[1] if call.lengths is None else call.lengths.clamp(min=1)[:, None, None, None]


def _means(v: Tensor, call: AttentionCall) -> Tensor:  # [B, 1, H, K], if causal [B, L, H, K]
    """Returns C v."""
    dtype = call.gains.dtype
    sums = v.cumsum(1, dtype=dtype) if call.causal else v.sum(1, keepdim=True, dtype=dtype)
    return sums.div_(_counts(call))


def _spread(grad: Tensor, call: AttentionCall) -> Tensor:  # [B, 1, H, K], if causal [B, L, H, K]
    """Returns Cᵀ grad."""
    if not call.causal:
        return grad.sum(1, keepdim=True, dtype=call.gains.dtype).div_(_counts(call))
    shares = grad / _counts(call)
    return (shares.sum(1, keepdim=True) - shares.cumsum(1)).add_(shares)


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:  # [B, L, H, K] twice -> [H]
    a = a.to(dtype) if a.dtype == torch.float16 else a  # products overflow in float16
    return (a * b).sum((0, 1, 3), dtype=dtype)


def _of_positive_scale(call: Call) -> tuple[Call, int]:
    """Returns a call with scale > 0 and equal logits, and dq's factor: other libraries mask by −inf before they scale."""
    if call.scale > 0:
        return call, 1
    q, sign = (-call.q, -1) if call.scale < 0 else (torch.zeros_like(call.q), 0)
    return replace(call, q=q, scale=-call.scale or 1.0), sign


def _terms(call: AttentionCall, av: Tensor, out: Tensor) -> None:
    """Writes alpha v + beta A v − gamma C v to `out`. The caller handles padding, which the Triton kernels do themselves."""
    alpha, beta, gamma = call.gains[:, :, None]
    torch.addcmul(-gamma * _means(call.v, call), call.v, alpha, out=out)
    out.addcmul_(av, beta)


def _own_gradients(call: AttentionInto) -> Tensor:  # [3, H]
    """Writes to dv the terms without A; returns the gains' gradients."""
    alpha, _, gamma = call.gains[:, :, None]
    dtype, spread = call.gains.dtype, _spread(call.grad, call)
    d_gamma = (spread * (call.v if call.causal else call.v.sum(1, keepdim=True, dtype=dtype))).sum((0, 1, 3))
    d_gains = torch.stack([_dot(call.grad, call.v, dtype), _dot(call.grad, call.av, dtype), -d_gamma])
    torch.addcmul(spread.mul_(-gamma), call.grad, alpha, out=call.dv)
    return d_gains


def shaped_attention_fwd(attend: Forward, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the result, the log-sum-exps and A v. Scratch of plain torch: C v in the dtype of sums, if causal as large."""
    out, padded = call.q.new_empty(call.q.shape), _padded(call)
    if not call.q.numel():
        return out, call.gains.new_empty(*call.q.shape[:3]).transpose(1, 2).contiguous(), torch.empty_like(out)
    av, lse = attend(_of_positive_scale(call)[0])
    if padded is not None:
        lse = lse.masked_fill(padded[:, None, :, 0, 0], 0)
    if _fused(call):
        backends.kernel("attention.op", "shaped_attention_terms")(call, av, out)
        return out, lse.contiguous(), av.contiguous()
    if padded is not None:
        av, call = av.masked_fill(padded, 0), replace(call, v=call.v.masked_fill(padded, 0))
    _terms(call, av, out)
    if padded is not None:
        out.masked_fill_(padded, 0)
    return out, lse.contiguous(), av.contiguous()


def shaped_attention_bwd(attend: tuple[Forward, Backward], call: AttentionInto) -> Tensor:  # [3, H]
    """Writes dq, dk and dv; returns the gains' gradients.

    dv = alpha dO + beta Aᵀ dO − gamma Cᵀ dO; dalpha = Σ dO v, dbeta = Σ dO A v, dgamma = −Σ v Cᵀ dO. Scratch: the three
    results of the attention.
    """
    if not call.q.numel():
        return torch.zeros_like(call.gains)
    fused = _fused(call)
    padded = None if fused else _padded(call)
    if padded is not None:
        call = replace(call, v=call.v.masked_fill(padded, 0), grad=call.grad.masked_fill(padded, 0))
    call, sign = _of_positive_scale(call)
    if not call.av.numel():  # forward did not keep A v
        av, lse = attend[0](call)
        call = replace(call, av=av if padded is None else av.masked_fill(padded, 0), lse=lse)
    if fused:
        return backends.kernel("attention.op", "shaped_attention_gradients")(call, attend[1](call), sign)
    d_gains = _own_gradients(call)
    dq, dk, dv = attend[1](call)
    beta = call.gains[1, :, None]
    torch.mul(dq, sign * beta, out=call.dq)
    torch.mul(dk, beta, out=call.dk)
    call.dv.addcmul_(dv, beta)
    for written in (call.dq, call.dk, call.dv) if padded is not None else ():
        written.masked_fill_(padded, 0)
    return d_gains
