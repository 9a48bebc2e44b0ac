"""Forward and backward of LayerNorm and RMSNorm over the last dimension, for simplified_block, which runs forward twice."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops.block.call import BlockCall
from simplclip.ops.calls import accumulate_dtype

NORMS = ("layernorm", "rmsnorm")
aten = torch.ops.aten


def _like(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Casts the weights to a dtype that layer norm accepts: on a CPU float32 weights may go with a half x, on a GPU not."""
    mixed = x.device.type == "cpu" and x.dtype != torch.float64
    dtype = torch.float32 if mixed and any(t is not None and t.dtype != x.dtype for t in tensors) else x.dtype
    return [None if t is None else t.to(dtype) for t in tensors]


def norm_fwd(x: Tensor, call: BlockCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the normalised x [T, C] in the dtype of x, and the statistics that `norm_bwd` needs."""
    weight, bias = call.norm_weight, call.norm_bias
    if call.norm == "layernorm":
        n, mean, rstd = aten.native_layer_norm(x, [x.shape[1]], *_like(x, weight, bias), call.eps)
        return n, (mean, rstd)
    wide = x.to(accumulate_dtype(x.dtype))
    rstd = (wide.square().mean(1, keepdim=True) + call.eps).rsqrt()
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype), (rstd,)


def norm_bwd(
    grad: Tensor,  # [T, C]
    x: Tensor,  # [T, C]
    call: BlockCall,
    stats: tuple[Tensor, ...],
    need: dict[str, bool],
) -> dict[str, Tensor | None]:
    """Returns the gradients of x, norm_weight and norm_bias, each in the dtype of its tensor."""
    weight, bias = call.norm_weight, call.norm_bias
    need_x, need_weight = need["x"], need["norm_weight"]
    if call.norm == "layernorm":
        w, b = _like(x, weight, bias)
        mask = [need_x, need_weight, need["norm_bias"] and bias is not None]
        dx, dw, db = aten.native_layer_norm_backward(grad, x, [x.shape[1]], *stats, w, b, mask)
    else:
        (rstd,) = stats
        normed, wide = x.to(rstd.dtype) * rstd, grad.to(rstd.dtype)
        dw, db = (wide * normed).sum(0) if need_weight else None, None
        wide = wide * weight.to(rstd.dtype)
        dx = (rstd * (wide - normed * (wide * normed).mean(1, keepdim=True))).to(x.dtype) if need_x else None
    dw, db = None if dw is None else dw.to(weight.dtype), None if db is None else db.to(bias.dtype)
    return {"x": dx, "norm_weight": dw, "norm_bias": db}
