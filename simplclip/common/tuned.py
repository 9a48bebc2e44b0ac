"""The choices that `simplclip tune` made by measuring on this machine, as the ops read them at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from simplclip.common.machine import known

SECTION = "tuned"  # of the findings in `machine`
_trial: dict[str, dict[str, Any]] = {}  # choices in place of the stored ones, while their candidates are measured


def choices(device: str) -> dict[str, Any]:
    """Returns the choices on a device type: name -> value. A choice without a value has its default."""
    return _trial[device] if device in _trial else known(SECTION, device).get("choices", {})


def name_of(what: str, dtype: torch.dtype) -> str:
    return f"{what}, {str(dtype).removeprefix('torch.')}"


def tuned(what: str, dtype: torch.dtype, device: str, default: int) -> int:
    """Returns the number of bytes that was chosen for calls of this dtype, or the default."""
    found = choices(device).get(name_of(what, dtype))
    return found if isinstance(found, int) else default


# Set as by torch.compiler.assume_constant_result, without its import of torch._dynamo: traced code cannot read the file.
tuned._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def trial(device: str, of: dict[str, Any]) -> Iterator[None]:
    """Context in which `of` are the choices of a device type."""
    before = _trial.copy()
    _trial[device] = of
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
