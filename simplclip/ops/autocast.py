"""Autocast around the ops, whose arguments it casts and whose kernels it must not touch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled.

    There is no autocast for meta tensors: torch raises when asked about it.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(first: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """Returns the tensors, cast to autocast's dtype if autocast is enabled on the first's device.

    float64 is not cast.
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
