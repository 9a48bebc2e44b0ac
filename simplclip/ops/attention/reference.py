"""shaped_attention in plain torch: two [B, H, L, L] matrices, in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionGradient, AttentionInto
from simplclip.calls.fields import accumulate_dtype
from simplclip.ops.backends import Reference


def _visible(call: AttentionCall) -> Tensor:
    """Returns a mask [B or 1, 1, L, L]: whether a query (row) sees a key; padding does not."""
    length = call.q.shape[1]
    device = call.q.device
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device)
    if call.causal:
        visible = visible.tril()
    if call.lengths is not None:
        valid = torch.arange(length, device=device) < call.lengths[:, None]  # [B, L]
        visible = visible & valid[:, None, :] & valid[:, :, None]
    return visible[:, None]


def _heads(visible: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Returns copies [B, H, L, K] in the dtype of sums; 0 at padding, as 0 times its NaN is NaN."""
    seen = visible.any(-1)[..., None]  # [B or 1, 1, L, 1]
    dtype = accumulate_dtype(tensors[0].dtype)
    return [t.transpose(1, 2).to(dtype).masked_fill(~seen, 0) for t in tensors]


def _uniform(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uniform attention weights C [B or 1, 1, L, L]: 1 / (number of visible keys), or 0."""
    return visible.to(dtype) / visible.sum(-1, keepdim=True).clamp(min=1)


class ReferenceAttention(Reference):
    """Backend "reference"."""

    @staticmethod
    def shaped_attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Returns out = alpha v + beta A v − gamma C v [B, L, H, K], and log-sum-exps [B, H, L].

        A = softmax(q kᵀ scale) and the uniform attention C are over the keys that a query sees, as
        are the log-sum-exps, which are in the dtype of sums. Both results are 0 at padded tokens.
        """
        visible = _visible(call)
        q, k, v = _heads(visible, call.q, call.k, call.v)
        logits = (call.scale * q @ k.mT).masked_fill(~visible, -torch.inf)
        lse = logits.logsumexp(-1).masked_fill(~visible.any(-1), 0)
        alpha, beta, gamma = call.gains[:, :, None, None]
        mixing = beta * (logits - lse[..., None]).exp() - gamma * _uniform(visible, lse.dtype)
        seen = visible.any(-1)[..., None]
        # Filled with 0 so that backward does not read gradients at padded tokens, which may be NaN.
        out = (alpha * v + mixing @ v).masked_fill(~seen, 0)
        return out.transpose(1, 2).to(call.q.dtype).clone(
            memory_format=torch.contiguous_format
        ), lse

    @staticmethod
    def shaped_attention_bwd(call: AttentionInto) -> Tensor:  # [3, H]
        """Overwrites call.dq, call.dk and call.dv; returns the gradients of alpha, beta and gamma.

        With the attention weights A, the uniform weights C, do = call.grad, dP = do vᵀ,
        δ = rowsum(A ∘ dP) and dS = beta A ∘ (dP − δ): dq = scale dS k, dk = scale dSᵀ q,
        dv = alpha do + (beta A − gamma C)ᵀ do; dalpha = tr dP, dbeta = Σ δ, dgamma = −Σ C ∘ dP.
        """
        visible = _visible(call)
        grad, q, k, v = _heads(visible, call.grad, call.q, call.k, call.v)
        a = (call.scale * q @ k.mT - call.lse[..., None]).masked_fill(~visible, -torch.inf).exp()
        c = _uniform(visible, a.dtype)
        alpha, beta, gamma = call.gains[:, :, None, None]
        dp = grad @ v.mT
        delta = (a * dp).sum(-1, keepdim=True)
        ds = call.scale * beta * a * (dp - delta)
        call.dq.copy_((ds @ k).transpose(1, 2))
        call.dk.copy_((ds.mT @ q).transpose(1, 2))
        call.dv.copy_((alpha * grad + (beta * a - gamma * c).mT @ grad).transpose(1, 2))
        return torch.stack(
            [(grad * v).sum((0, 2, 3)), delta.sum((0, 2, 3)), -(c * dp).sum((0, 2, 3))]
        )


def empty_results(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors like the results of a backend's forward."""
    batch, length, heads, _ = call.q.shape
    lse = call.q.new_empty(batch, heads, length, dtype=call.gains.dtype)
    return call.q.new_empty(call.q.shape), lse


def empty_gradient(call: AttentionGradient) -> Tensor:
    """Returns an uninitialised gradient of the gains, the result of a backend's backward."""
    return torch.empty_like(call.gains)
