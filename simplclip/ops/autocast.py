"""Autocast around the ops, whose arguments it casts and whose kernels it must not touch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for the device's type; False for meta, where torch raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context without autocast for the device's type; for meta it does nothing."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(first: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """Returns the tensors in order, cast to autocast's dtype if it is on for the first's device.

    float64 tensors are not cast, and None stays None. Nothing is changed in place.
    """
    tensors = (first, *others)
    if not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    cast = []
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype != torch.float64:
            t = t.to(dtype)
        cast.append(t)
    return cast
