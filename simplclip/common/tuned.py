"""The choices that `simplclip tune` made by measuring on this machine, as the ops read them at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from simplclip.common.machine import known

SECTION = "tuned"  # of what is known of a device
_trial: dict[str, dict[str, Any]] = {}  # choices in place of the stored ones, while their candidates are measured


def choices(device: str) -> dict[str, Any]:
    """What was chosen on a device type, by the name of the choice; a choice that is not there has its default."""
    return _trial[device] if device in _trial else known(SECTION, device).get("choices", {})


def name_of(what: str, dtype: torch.dtype) -> str:
    return f"{what}, {str(dtype).removeprefix('torch.')}"


def tuned(what: str, dtype: torch.dtype, device: str, default: int) -> int:
    """The number of bytes that was chosen for calls of this dtype, or the default."""
    found = choices(device).get(name_of(what, dtype))
    return found if isinstance(found, int) else default


# What torch.compiler.assume_constant_result sets, which would import all of torch._dynamo: a file is read, by no traced code.
tuned._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def trial(device: str, of: dict[str, Any]) -> Iterator[None]:
    """Context in which these are the choices of a device type."""
    before = _trial.copy()
    _trial[device] = of
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
