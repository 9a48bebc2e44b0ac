"""The frozen beginning of a tower, whose output gradient caching keeps between its two passes over
a micro-batch.

The beginning is found by a trial: frozen modules whose output needs no gradient, each of which gets
the output of the one before. When a micro-batch is encoded again, the last of them returns what it
returned the first time. Those before it return a tensor of the same shape on the meta device, so
that code may read the shapes of their outputs, and any use of the values is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simplclip.common import generators
from simplclip.models.inherit import largest_modules

Batch = dict[Any, Any]
Encode = Callable[[Batch], Tensor]


class Beginning:
    """Frozen modules that run one after the other; outputs of the last one are kept.

    They are kept in the micro-batch itself, a list whose key is this object: the modules' outputs
    in the order of their calls, those of other modules than the last on the meta device. The
    modules run several times for texts that are cropped to several lengths.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Replaces `forward` of modules, in their order."""
        self.modules = modules
        # forwards that were set on a module itself before
        self._forwards = [vars(module).get("forward") for module in modules]
        # outputs with their versions, which an operation in place changes
        self._recorded: list[tuple[Tensor, int]] | None = None
        self._replayed: list[Tensor] | None = None
        for module in modules:
            last = module is modules[-1]
            module.forward = partial(_forward, self, last, module.forward)

    def encode(self, function: Encode, batch: Batch) -> Tensor:
        """Returns function(batch), the features of a micro-batch, which keeps or uses outputs.

        Without autograd, the first time, outputs of the last module are kept in `batch`, unless
        something has changed them in place. With autograd, the second time, they are used in place
        of running the modules, and forgotten; if none are kept the modules run.
        """
        # none are kept of the last micro-batch, which is encoded once
        kept = batch.pop(self, None)
        if torch.is_grad_enabled():
            self._replayed = kept
        else:
            self._recorded = []
        try:
            features = function(batch)
            recorded = self._recorded
            if recorded is not None and all(t._version == version for t, version in recorded):
                batch[self] = [output for output, _ in recorded]
            return features
        finally:
            self._recorded = self._replayed = None

    def remove(self) -> None:
        """Gives the modules back the `forward` that they had."""
        for module, forward in zip(self.modules, self._forwards):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@torch.compiler.disable(recursive=False)
def _forward(
    beginning: Beginning, last: bool, forward: Callable, *args: Any, **options: Any
) -> Tensor:
    """Runs as `forward` of a module in `beginning`, and keeps or uses outputs, see its `encode`."""
    if beginning._replayed is not None:
        return beginning._replayed.pop(0)
    output = forward(*args, **options)
    if beginning._recorded is not None:
        # of other modules' outputs only the layout is kept
        kept = output
        if not last:
            kept = torch.empty_strided(
                output.shape, output.stride(), dtype=output.dtype, device="meta"
            )
        beginning._recorded.append((kept, kept._version))
    return output


class _Call(NamedTuple):
    """A call of a module in a trial."""

    module: nn.Module
    first_input: Any
    output: Any


def find_beginning(model: nn.Module, encode: Encode, batch: Batch) -> tuple[Beginning, int] | None:
    """Finds the frozen beginning of a tower by encoding `batch`, of one text or image.

    Returns it and the bytes of its output; None, with the modules as before, if it has no weights
    that multiply, or if the tower does not compute the same features by it.
    """
    modules = [
        module for module in largest_modules(model).values() if not isinstance(module, nn.Embedding)
    ]
    if not modules:
        return None
    states = generators.states()
    try:
        features, chain = _trial(modules, encode, batch)
    finally:
        generators.restore(states)
    if not chain:
        return None
    beginning = Beginning([call.module for call in chain])
    batch = dict(batch)  # in which the outputs are kept
    try:
        with torch.no_grad():
            beginning.encode(encode, batch)
        generators.restore(states)
        works = beginning in batch
        with torch.enable_grad():
            works = works and _equal(beginning.encode(encode, batch), features)
    except (RuntimeError, TypeError, ValueError):
        works = False
    generators.restore(states)
    if not works:
        beginning.remove()
        return None
    return beginning, chain[-1].output.nbytes


def _equal(features: Tensor, expected: Tensor) -> bool:
    """Whether features are equal up to rounding."""
    if features.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    error = (features.detach() - expected.detach()).double().norm()
    return bool(error <= tolerance * expected.detach().double().norm())


def _trial(modules: list[nn.Module], encode: Encode, batch: Batch) -> tuple[Tensor, list[_Call]]:
    """Encodes a batch; returns its features, and the calls of `modules` that `_chain` leaves."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        calls.append(_Call(module, args[0] if args else None, output))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.enable_grad():
            features = encode(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return features, _chain(calls)


def _chain(calls: list[_Call]) -> list[_Call]:
    """Returns the calls, of frozen modules, that are the beginning; none without matrices."""
    calls = [
        call for call in calls if isinstance(call.output, Tensor) and not call.output.requires_grad
    ]
    chain = calls[-1:]
    for call in reversed(calls[:-1]):
        if call.output is not chain[0].first_input:
            break
        chain.insert(0, call)
    weights = [weight for call in chain for weight in call.module.parameters()]
    repeated = len({call.module for call in calls}) < len(calls)
    if repeated or not any(weight.dim() > 1 for weight in weights):
        return []
    return chain
