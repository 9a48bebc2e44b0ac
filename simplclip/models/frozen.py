"""The frozen parts of a model in training: they run as folded copies in channels_last, in the precision of the run.

    frozen = FrozenParts(model, torch.bfloat16)  # after `inherit` or `freeze`, when the frozen weights have their values

A part is a module that `freeze` froze, inside no larger frozen one. Its own tensors stay where they are and are saved, moved
and counted as before. The copies belong to no module, so that no state dict has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from simplclip.models.fold import fold, has_hooks
from simplclip.models.inherit import is_frozen


class FrozenPart:
    """A frozen module and its folded copy. A part is the `forward` of its module."""

    def __init__(self, name: str, module: nn.Module, folded: nn.Module, dtype: torch.dtype | None) -> None:
        self.name, self.module, self.folded, self.dtype = name, module, folded, dtype
        module.forward = self

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype != self.dtype:
            return type(self.module).forward(self.module, x, *args, **options)
        return self.folded(x, *args, **options)


class FrozenParts:
    """The frozen modules of `model` with convolutions and without hooks, which run as folded copies from now on.

    dtype: the dtype of the run's autocast, None for fp32. Convolutions and linear layers of the copies are stored in it.
    Other tensors stay in fp32, so that values are rounded where autocast rounds. A module that runs under another autocast
    does not use its copy.

    Gradients pass through a part to its input if the input needs a gradient. The weights must not change afterwards; `to`
    moves the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        copies = [(name, module, _copy(module, dtype)) for name, module in _largest(model, "", set())]
        self.parts = [FrozenPart(name, module, folded, dtype) for name, module, folded in copies if folded is not None]

    @property
    def copies(self) -> list[nn.Module]:
        return [part.folded for part in self.parts]

    def to(self, device: torch.device) -> None:
        for folded in self.copies:
            folded.to(device)

    def lines(self) -> list[str]:
        """Returns lines for the log: the names of the parts."""
        names = ", ".join(part.name for part in self.parts)
        return [f"folded, in channels_last: {names}"] if names else []


def _largest(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the frozen modules that are in no larger frozen module, each once, in the order of the model."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if is_frozen(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _largest(child, f"{name}.{child_name}".lstrip("."), seen)


def _copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module | None:
    """Returns a folded copy of a module, or None if it would save next to nothing or compute something else."""
    inside = list(module.modules())
    convolutions = sum(isinstance(inner, _ConvNd) for inner in inside)
    if not convolutions or any(has_hooks(inner) for inner in inside[1:]):
        return None
    folded = fold(module)
    # A vision transformer's patches are a single convolution, with nothing to fold.
    if convolutions == 1 and [n for n, _ in folded.named_modules()] == [n for n, _ in module.named_modules()]:
        return None
    for inner in folded.modules() if dtype else ():
        if isinstance(inner, (_ConvNd, nn.Linear)):
            inner.to(dtype)
    return folded.to(memory_format=torch.channels_last)
