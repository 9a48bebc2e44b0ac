"""shaped_attention in plain torch: two [B, H, L, L] matrices, in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.calls.fields import accumulate_dtype


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


def _definition(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, gains: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns out [B, L, H, K] and log-sum-exps [B, H, L], in the dtype of sums, of the call's mask
    and scale; 0 at padded tokens.
    """
    visible = _visible(call)
    q, k, v = _heads(visible, q, k, v)
    seen = visible.any(-1)[..., None]
    # finite, so that autograd makes no NaN of it
    logits = (call.scale * q @ k.mT).masked_fill(~visible, torch.finfo(q.dtype).min)
    alpha, beta, gamma = gains[:, :, None, None]
    uniform = visible.to(q.dtype) / visible.sum(-1, keepdim=True).clamp(min=1)
    mixing = beta * logits.softmax(-1).masked_fill(~visible, 0) - gamma * uniform
    # Filled with 0 so that backward does not read gradients at padded tokens, which may be NaN.
    out = (alpha * v + mixing @ v).masked_fill(~seen, 0)
    return out.transpose(1, 2), logits.logsumexp(-1).masked_fill(~seen[..., 0], 0)


def shaped_attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns out = alpha v + beta A v − gamma C v [B, L, H, K], and log-sum-exps [B, H, L].

    A = softmax(q kᵀ scale) and the uniform attention C are over the keys that a query sees, as
    are the log-sum-exps, which are in the dtype of sums. Both results are 0 at padded tokens.
    """
    out, lse = _definition(call, call.q, call.k, call.v, call.gains)
    return out.to(call.q.dtype).clone(memory_format=torch.contiguous_format), lse


def shaped_attention_bwd(call: AttentionInto) -> Tensor:  # [3, H]
    """Overwrites call.dq, call.dk and call.dv; returns the gradients of alpha, beta and gamma.

    Autograd differentiates the definition.
    """
    dtype = call.gains.dtype
    with torch.enable_grad():
        leaves = [
            t.detach().to(dtype).requires_grad_() for t in (call.q, call.k, call.v, call.gains)
        ]
        out, _ = _definition(call, *leaves)
    *gradients, d_gains = torch.autograd.grad(out, leaves, call.grad.to(dtype))
    for result, gradient in zip((call.dq, call.dk, call.dv), gradients):
        result.copy_(gradient)
    return d_gains
