"""Forward and backward of LayerNorm and RMSNorm over the last dimension, for simplified_block, which runs forward twice."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype

NORMS = ("layernorm", "rmsnorm")
aten = torch.ops.aten


def _like(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The weights in a dtype that layer norm accepts: on a CPU they may be wider than its input, on a GPU they may not."""
    mixed = x.device.type == "cpu" and x.dtype != torch.float64
    dtype = torch.float32 if mixed and any(t is not None and t.dtype != x.dtype for t in tensors) else x.dtype
    return [None if t is None else t.to(dtype) for t in tensors]


def norm_fwd(
    x: Tensor,  # [T, C]
    norm: str,
    weight: Tensor,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The normalised x [T, C] in its dtype, and the statistics that `norm_bwd` needs."""
    if norm == "layernorm":
        n, mean, rstd = aten.native_layer_norm(x, [x.shape[1]], *_like(x, weight, bias), eps)
        return n, (mean, rstd)
    wide = x.to(accumulate_dtype(x.dtype))
    rstd = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype), (rstd,)


def norm_bwd(
    grad: Tensor,  # [T, C]
    x: Tensor,
    norm: str,
    weight: Tensor,
    bias: Tensor | None,
    stats: tuple[Tensor, ...],
    need: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, the last two in their own dtype."""
    if norm == "layernorm":
        w, b = _like(x, weight, bias)
        mask = [need[0], need[1], need[2] and bias is not None]
        dx, dw, db = aten.native_layer_norm_backward(grad, x, [x.shape[1]], *stats, w, b, mask)
    else:
        (rstd,) = stats
        normed, wide = x.to(rstd.dtype) * rstd, grad.to(rstd.dtype)
        dw, db = (wide * normed).sum(0) if need[1] else None, None
        wide = wide * weight.to(rstd.dtype)
        dx = (rstd * (wide - normed * (wide * normed).mean(1, keepdim=True))).to(x.dtype) if need[0] else None
    return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(bias.dtype)
