"""The same values in other memory layouts: views that equal `t`, or None where it has no such view."""

from __future__ import annotations

import torch
from torch import Tensor


def _around(t: Tensor, *shape: int) -> Tensor:
    """Memory around a view: what a kernel must not read is NaN, or for integers a number that no call uses."""
    return t.new_full(shape, torch.nan if t.is_floating_point() else 987_654_321)


def strided(t: Tensor) -> Tensor | None:
    """Every second element of each dimension."""
    if t.dim() == 0:
        return None
    every_second = (slice(None, None, 2),) * t.dim()
    return _around(t, *(2 * size - 1 for size in t.shape))[every_second].copy_(t)


def rows_apart(t: Tensor) -> Tensor | None:
    """Every second row; the elements of a row lie together."""
    if t.dim() < 2:
        return None
    return _around(t, *t.shape[:-1], 2 * t.shape[-1])[..., : t.shape[-1]].copy_(t)


def transposed(t: Tensor) -> Tensor | None:
    """Dimensions in the opposite order in memory."""
    if t.dim() < 2:
        return None
    return _around(t, *t.shape[::-1]).permute(*range(t.dim())[::-1]).copy_(t)


def offset(t: Tensor) -> Tensor:
    """Contiguous, but not from the start of its memory, nor from a multiple of more than its element."""
    return _around(t, t.numel() + 4)[3:-1].view(t.shape).copy_(t)


def negated(t: Tensor) -> Tensor:
    """A view with torch's negative bit: the memory holds -t."""
    return torch._neg_view(-t)


def imaginary(t: Tensor) -> Tensor | None:
    """The imaginary part of a conjugated complex tensor: every second element, with the negative bit."""
    if t.dtype not in (torch.float32, torch.float64):
        return None
    return torch.complex(torch.full_like(t, torch.nan), -t).conj().imag


def expanded(t: Tensor) -> Tensor | None:
    """One element or row, and no more memory, for all: of other values than t's, whose first it repeats."""
    return None if t.dim() == 0 else t[:1].clone().expand(t.shape)


def scalar_expanded(t: Tensor) -> Tensor | None:
    """One element for all, of other values than t's."""
    return None if t.dim() == 0 else t.flatten()[:1].clone().view([1] * t.dim()).expand(t.shape)


SAME = {f.__name__: f for f in (strided, rows_apart, transposed, offset, negated, imaginary)}
OTHER = {f.__name__: f for f in (expanded, scalar_expanded)}
ALL = SAME | OTHER
