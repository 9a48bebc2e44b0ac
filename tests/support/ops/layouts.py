"""Views in other memory layouts, None where a tensor has no such view.

Those in SAME equal the tensor, those in OTHER repeat a part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _around(t: Tensor, *shape: int) -> Tensor:
    """Returns memory that a kernel must not read: of NaN, or of a number that no call uses."""
    return t.new_full(shape, torch.nan if t.is_floating_point() else 987_654_321)


def strided(t: Tensor) -> Tensor | None:
    """Returns every second element of each dimension."""
    if t.dim() == 0:
        return None
    every_second = (slice(None, None, 2),) * t.dim()
    return _around(t, *(2 * size - 1 for size in t.shape))[every_second].copy_(t)


def rows_apart(t: Tensor) -> Tensor | None:
    """Returns rows with gaps between them; the elements of a row lie together."""
    if t.dim() < 2:
        return None
    return _around(t, *t.shape[:-1], 2 * t.shape[-1])[..., : t.shape[-1]].copy_(t)


def transposed(t: Tensor) -> Tensor | None:
    """Returns a view whose dimensions are in the opposite order in memory."""
    if t.dim() < 2:
        return None
    return _around(t, *t.shape[::-1]).permute(*range(t.dim())[::-1]).copy_(t)


def offset(t: Tensor) -> Tensor:
    """Returns a contiguous view that begins inside its memory, aligned to its element size
    alone.
    """
    return _around(t, t.numel() + 4)[3:-1].view(t.shape).copy_(t)


def negated(t: Tensor) -> Tensor:
    """Returns a view with torch's negative bit: the memory holds -t."""
    return torch._neg_view(-t)


def imaginary(t: Tensor) -> Tensor | None:
    """Returns the imaginary part of a conjugated complex tensor: every second element, with the
    negative bit.
    """
    if t.dtype not in (torch.float32, torch.float64):
        return None
    return torch.complex(torch.full_like(t, torch.nan), -t).conj().imag


def expanded(t: Tensor) -> Tensor | None:
    """Repeats t's first element or row without more memory; the values are not those of t."""
    if t.dim() == 0:
        return None
    return t[:1].clone().expand(t.shape)


def scalar_expanded(t: Tensor) -> Tensor | None:
    """Repeats t's first element without more memory; the values are not those of t."""
    if t.dim() == 0:
        return None
    return t.flatten()[:1].clone().view([1] * t.dim()).expand(t.shape)


def odd_rows(t: Tensor) -> Tensor | None:
    """Returns rows with gaps between them that begin at odd addresses."""
    if t.dim() < 2:
        return None
    return _around(t, *t.shape[:-1], t.shape[-1] + 16)[..., 1:-15].copy_(t)


def heads_first(t: Tensor) -> Tensor | None:
    """Returns [B, L, H, K] whose heads lie before tokens in memory."""
    if t.dim() != 4:
        return None
    return t.transpose(1, 2).contiguous().transpose(1, 2)


SAME = {f.__name__: f for f in (strided, rows_apart, transposed, offset, negated, imaginary)}
OTHER = {f.__name__: f for f in (expanded, scalar_expanded)}
ALL = SAME | OTHER | {f.__name__: f for f in (odd_rows, heads_first)}
