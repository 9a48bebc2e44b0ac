"""feature_loss in plain torch."""

from __future__ import annotations

import torch

from simplclip.ops.dtypes import accumulate_dtype

NORM_EPS = 1e-12  # F.normalize's


def _feature_difference(student, teacher, inv_norms):
    """u and u − t, [N, D], in the accumulation dtype; normalised unless inv_norms is empty."""
    dtype = accumulate_dtype(student.dtype)
    u, t = student.to(dtype), teacher.to(dtype)
    if inv_norms.shape[1]:
        u, t = u * inv_norms[0][:, None], t * inv_norms[1][:, None]
    return u, u - t


def feature_loss_fwd(student, teacher, smooth, beta, normalize):
    """See simplclip.ops.feature.op. Returns the loss [] and the inverse norms [2, N], or [2, 0] if not `normalize`."""
    dtype = accumulate_dtype(student.dtype)
    if normalize:
        inv_norms = torch.stack([t.to(dtype).norm(dim=1).clamp_min(NORM_EPS).reciprocal() for t in (student, teacher)])
    else:
        inv_norms = student.new_empty(2, 0, dtype=dtype)
    _, difference = _feature_difference(student, teacher, inv_norms)
    size = difference.abs()
    square = size * size
    distance = torch.where(size < beta, 0.5 * square / beta, size - 0.5 * beta) if smooth else square
    return distance.mean(), inv_norms


def feature_loss_bwd(grad, student, teacher, inv_norms, smooth, beta):
    """Gradient of the student, [N, D]: with g = dloss/du, (g − u (u·g)) / norm; below eps, g / eps."""
    u, difference = _feature_difference(student, teacher, inv_norms)
    slope = (difference / beta).clamp(-1, 1) if smooth else 2 * difference
    g = grad / slope.numel() * slope
    if inv_norms.shape[1]:
        along = (u * g).sum(1, keepdim=True)
        inv = inv_norms[0][:, None]
        clamped = inv >= inv.new_tensor(NORM_EPS).reciprocal()
        g = (g - u * along.masked_fill(clamped, 0)) * inv
    return g.to(student.dtype)
