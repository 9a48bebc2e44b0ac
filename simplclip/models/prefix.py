"""The frozen parts of a model in training: they run as folded copies in channels_last, in the precision of the run.

    frozen = FrozenParts(model, torch.bfloat16)      # after `inherit` or `freeze`, when the frozen weights have their values
    prefix = Prefix(frozen, images[:1])              # the frozen parts that come first in the image tower
    outputs = prefix(images)

A part is a module that `freeze` froze, inside no larger frozen one. Its own tensors stay where they are and are saved, moved
and counted as before. The copies belong to no module: no state dict, deep copy or pickle of the model has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from simplclip.common.errors import InputError
from simplclip.models.fold import fold
from simplclip.models.inherit import is_frozen


class FrozenPart:
    """A frozen module and its folded copy, if it has one. `install` makes the part the module's `forward`."""

    def __init__(self, name: str, module: nn.Module, folded: nn.Module | None, dtype: torch.dtype | None) -> None:
        self.name, self.module, self.folded, self.dtype = name, module, folded, dtype
        self.prefix: Prefix | None = None  # set if the part belongs to a prefix

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        if self.prefix is not None and self.prefix.is_replaced:
            return x  # x is the prefix's output already
        return self.run(x, *args, **options)

    def run(self, x: Tensor, *args: Any, **options: Any) -> Any:
        if self.folded is None or self.dtype != _autocast_dtype(x.device.type):
            return type(self.module).forward(self.module, x, *args, **options)
        return self.folded(x, *args, **options)

    def install(self) -> None:
        self.module.forward = self

    def __reduce__(self) -> tuple:
        # A deep copy or pickle gets its class's `forward`: while getattr runs, the copied module has no attributes yet.
        return getattr, (self.module, "forward")


class FrozenParts:
    """The frozen modules of `model`. Those with convolutions run as folded copies from now on.

    dtype: the dtype of the run's autocast, None for fp32. Convolutions and linear layers of the copies are stored in it.
    Other tensors stay in fp32, so that values are rounded where autocast rounds. A module that runs under another autocast
    does not use its copy.

    Gradients pass through a part to its input if the input needs a gradient. The weights must not change afterwards; `to`
    moves the copies. `lines` lists the copies, and the modules that could not be copied with the reason.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.refused: dict[str, str] = {}
        self.parts = [self._part(name, module) for name, module in _largest(model, "", set())]
        for part in self.parts:
            if part.folded is not None:
                part.install()

    def _part(self, name: str, module: nn.Module) -> FrozenPart:
        folded = None
        convolutions = sum(isinstance(inner, _ConvNd) for inner in module.modules())
        if convolutions:
            try:
                folded = self._folded(module, convolutions)
            except Exception as error:  # of any type, from methods of other libraries
                self.refused[name] = f"{type(error).__name__}: {error}"
        return FrozenPart(name, module, folded, self.dtype)

    def _folded(self, module: nn.Module, convolutions: int) -> nn.Module | None:
        if any(inner._forward_hooks or inner._forward_pre_hooks for inner in list(module.modules())[1:]):
            raise InputError("expected no hooks in it, which the copy would not call")
        folded = fold(module)
        # Where the only convolution has nothing to fold, as in a vision transformer, a copy would save next to nothing.
        if convolutions == 1 and _kinds(folded) == _kinds(module):
            return None
        for inner in folded.modules() if self.dtype else ():
            if isinstance(inner, (_ConvNd, nn.Linear)):
                inner.to(self.dtype)
        return folded.requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def copies(self) -> list[nn.Module]:
        return [part.folded for part in self.parts if part.folded is not None]

    @property
    def bytes(self) -> int:
        """The size of the copies in bytes."""
        return sum(t.nbytes for copy in self.copies for t in (*copy.parameters(), *copy.buffers()))

    def to(self, device: torch.device) -> None:
        for copy in self.copies:
            copy.to(device)

    def lines(self) -> list[str]:
        names = [part.name for part in self.parts if part.folded is not None]
        found = [f"{name or 'the model'} runs as it is: {reason}" for name, reason in self.refused.items()]
        if names:
            form = "folded, in channels_last" + ("" if self.dtype is None else f" and {self.dtype}".replace("torch.", ""))
            found.insert(0, f"{form}, copies of {self.bytes / 2**20:.1f} MiB: {', '.join(names)}")
        return found


class Prefix:
    """The frozen parts at the beginning of the image tower: the input of each part is the output of the part before it.

    image: pixels [1, 3, S, S], on which the tower runs to find the parts. `shape`: of the last part's output for an image.

    After `replace` the tower of a model in training mode takes outputs of the prefix in place of pixels; in eval mode it
    takes pixels as before.

    Raises InputError if the tower begins with no frozen part, or uses more values than the output of the last part.
    """

    def __init__(self, frozen: FrozenParts, image: Tensor) -> None:
        self.model, tower = frozen.model, frozen.model.get_submodule("visual")
        self.parts: list[FrozenPart] = []
        self._trying = self._replaced = False
        seen: list[tuple[FrozenPart, Any, Any]] = []
        hooks = [
            part.module.register_forward_hook(lambda _, given, output, part=part: seen.append((part, given[:1], output)))
            for part in frozen.parts
        ]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                expected = tower(image)
                for hook in hooks:
                    hook.remove()
                last: Any = image
                for part, given, output in seen:
                    if not given or given[0] is not last or not isinstance(output, Tensor):
                        break
                    self.parts.append(part)
                    last = output
                if not self.parts:
                    raise InputError("expected an image tower that begins with frozen modules, got one that does not")
                outputs = self(image)
                for part in self.parts:
                    part.prefix = self
                    part.install()
                self._trying = True
                if (tower(outputs) - expected).norm() > 0.01 * expected.norm():
                    raise InputError(f"expected a tower that uses the output of {self.name} alone, got one that uses others")
        finally:
            self._trying = False
            self.model.train(training)
        self.shape = tuple(outputs.shape[1:])

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the prefix's outputs for pixels [N, 3, S, S]."""
        for part in self.parts:
            images = part.run(images)
        return images

    @property
    def name(self) -> str:
        """The name of the last part's module."""
        return self.parts[-1].name

    @property
    def is_replaced(self) -> bool:
        """Whether the tower now gets outputs of the prefix, not pixels."""
        return self._trying or (self._replaced and self.model.training)

    def replace(self) -> None:
        self._replaced = True

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the parts' tensors."""
        digest = hashlib.sha256()
        for part in self.parts:
            for name, tensor in part.module.state_dict().items():
                digest.update(f"{part.name}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


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


def _kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(inner)) for name, inner in module.named_modules()]


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
