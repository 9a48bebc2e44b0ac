"""LayerNorm and RMSNorm over the last dimension, forward and backward, for simplified_block."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.calls.block import BlockCall, Needed
from simplclip.calls.fields import accumulate_dtype

NORMS = ("layernorm", "rmsnorm")
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias in a dtype that layer norm takes with x: that of x, or float32."""
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return weight, bias
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def norm_fwd(x: Tensor, call: BlockCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the normalised x [T, C] in its dtype, and (mean, rstd), or (rstd,) of RMSNorm."""
    weight, bias = call.norm_weight, call.norm_bias
    if call.norm == "layernorm":
        n, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], *_cast(x, weight, bias), call.eps)
        return n, (mean, rstd)
    wide = x.to(accumulate_dtype(x.dtype))
    rstd = (wide.square().mean(1, keepdim=True) + call.eps).rsqrt()
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype), (rstd,)


def norm_bwd(
    grad: Tensor,  # [T, C]
    x: Tensor,  # [T, C]
    call: BlockCall,
    stats: tuple[Tensor, ...],
    need: Needed,
) -> dict[str, Tensor]:
    """Returns the gradients that are needed of x [B, L, C], norm_weight and norm_bias, by name."""
    weight, bias = call.norm_weight, call.norm_bias
    if call.norm == "layernorm":
        mask = [need.x, need.norm_weight, need.norm_bias and bias is not None]
        cast = _cast(x, weight, bias)
        dx, dw, db = layer_norm_backward(grad, x, [x.shape[1]], *stats, *cast, mask)
    else:
        (rstd,) = stats
        normed, wide = x.to(rstd.dtype) * rstd, grad.to(rstd.dtype)
        dx = dw = db = None
        if need.norm_weight:
            dw = (wide * normed).sum(0)
        if need.x:
            wide = wide * weight.to(rstd.dtype)
            dx = rstd * (wide - normed * (wide * normed).mean(1, keepdim=True))
    gradients = {}
    for name, gradient in (("x", dx), ("norm_weight", dw), ("norm_bias", db)):
        if gradient is not None:
            like = getattr(call, name)
            gradients[name] = gradient.to(like.dtype).view(like.shape)
    return gradients
