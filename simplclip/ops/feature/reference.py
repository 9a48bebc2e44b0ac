"""feature_loss in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.feature.call import FeatureCall, FeatureGradient

NORM_EPS = 1e-12  # eps of F.normalize


def _difference(call: FeatureCall, inv_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u and u − t, [N, D], in the accumulation dtype; u and t are normalised if `normalize`."""
    u, t = (features.to(inv_norms.dtype) for features in (call.student, call.teacher))
    if call.normalize:
        u, t = u * inv_norms[0][:, None], t * inv_norms[1][:, None]
    return u, u - t


def feature_loss_fwd(call: FeatureCall) -> tuple[Tensor, Tensor]:
    """Returns the loss [] and the inverse norms [2, N], or [2, 0] if not `normalize`; see simplclip.ops.feature.op."""
    dtype = accumulate_dtype(call.student.dtype)
    inv_norms = call.student.new_empty(2, 0, dtype=dtype)
    if call.normalize:
        norms = [t.to(dtype).norm(dim=1).clamp_min(NORM_EPS) for t in (call.student, call.teacher)]
        inv_norms = torch.stack(norms).reciprocal()
    size = _difference(call, inv_norms)[1].abs()
    square = size * size
    distance = torch.where(size < call.beta, 0.5 * square / call.beta, size - 0.5 * call.beta) if call.smooth else square
    return distance.mean(), inv_norms


def feature_loss_bwd(call: FeatureGradient) -> Tensor:
    """Returns the gradient of the student, [N, D]: with g = dloss/du, (g − u (u·g)) / norm; for a norm below eps, g / eps."""
    u, difference = _difference(call, call.inv_norms)
    slope = (difference / call.beta).clamp(-1, 1) if call.smooth else 2 * difference
    g = call.grad / slope.numel() * slope
    if call.normalize:
        along = (u * g).sum(1, keepdim=True)
        inv = call.inv_norms[0][:, None]
        clamped = inv >= inv.new_tensor(NORM_EPS).reciprocal()
        g = (g - u * along.masked_fill(clamped, 0)) * inv
    return g.to(call.student.dtype)
