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
from torch.autograd.graph import saved_tensors_hooks

from simplclip.common import generators
from simplclip.models.inherit import frozen_modules
from simplclip.ops import modes

Batch = dict[str, Any]
Encode = Callable[[Batch], Tensor]


class _Output(NamedTuple):
    """An output that may be kept, and its version, which an operation in place would change."""

    tensor: Tensor
    version: int


class Prefix:
    """Frozen modules that run one after the other, and the kept outputs of the last one.

    A micro-batch whose texts are cropped to several lengths runs the modules several times. kept:
    by the id of a micro-batch, the modules' outputs in the order of their calls; those of other
    modules than the last are on the meta device.
    """

    def __init__(self, modules: list[nn.Module], compiled: bool = False) -> None:
        """Replaces `forward` of the modules, in the order in which they run, until `remove`.

        compiled: whether torch.compile compiles the tower: what keeps outputs is then not compiled.
        """
        function = torch.compiler.disable(_forward, recursive=False) if compiled else _forward
        self.modules = modules
        # forwards that were set on a module itself before
        self._forwards = [vars(module).get("forward") for module in modules]
        self.kept: dict[int, list[Tensor]] = {}
        self._recorded: list[_Output] | None = None
        self._replayed: list[Tensor] | None = None
        for module in modules:
            last = module is modules[-1]
            module.forward = partial(function, self, last, module.forward)  # type: ignore[method-assign]

    def encode(self, function: Encode, batch: Batch) -> Tensor:
        """Returns function(batch), the features of a micro-batch, which keeps or uses outputs.

        Without autograd, the first time, outputs of the last module are kept for this object
        `batch`, unless something has changed them in place. With autograd, the second time, they
        are used in place of running the modules, and forgotten; if none are kept the modules run.
        """
        if torch.is_grad_enabled():
            # none are kept of the last micro-batch, which is encoded once
            self._replayed = self.kept.pop(id(batch), None)
        else:
            self._recorded = []
        try:
            features = function(batch)
            outputs = self._recorded
            if outputs is not None and all(t._version == version for t, version in outputs):
                self.kept[id(batch)] = [output.tensor for output in outputs]
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


def _forward(prefix: Prefix, last: bool, forward: Callable, *args: Any, **options: Any) -> Any:
    """Runs as `forward` of a module in `prefix`, and keeps or uses outputs, see `Prefix.encode`.

    last: whether it is the last module. forward: the module's own, called with `args` and
    `options`. Of other modules' outputs only the layout is kept.
    """
    if prefix._replayed is not None:
        return prefix._replayed.pop(0)
    output = forward(*args, **options)
    if prefix._recorded is not None:
        kept = output if last else _on_meta(output)
        prefix._recorded.append(_Output(kept, kept._version))
    return output


def _on_meta(tensor: Tensor) -> Tensor:
    """Returns a tensor on the meta device with the shape, strides and dtype of another."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Call(NamedTuple):
    """A call of a module in a trial."""

    module: nn.Module
    first_input: Any
    output: Any


def find(
    model: nn.Module, encode: Encode, batch: Batch, compiled: bool = False
) -> tuple[Prefix, int] | None:
    """Finds the frozen beginning of a tower by encoding `batch`, of one text or image.

    encode: batch -> features of the tower. compiled: see `Prefix`.

    Returns the beginning and the bytes of its output for `batch`; its modules already have another
    `forward`, until `remove`. Returns None, with the modules as before, if there is none with
    weights that multiply, or if the tower does not compute the same features from its output.
    Generators are restored.
    """
    modules = [
        module for _, module in frozen_modules(model) if not isinstance(module, nn.Embedding)
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
    prefix = Prefix([call.module for call in chain], compiled)
    try:
        with torch.no_grad():
            prefix.encode(encode, batch)
        generators.restore(states)
        works = id(batch) in prefix.kept
        with torch.enable_grad(), _nothing_saved():
            works = works and _equal(prefix.encode(encode, batch), features)
    except (RuntimeError, TypeError, ValueError):
        works = False
    prefix.kept.clear()
    generators.restore(states)
    if not works:
        prefix.remove()
        return None
    return prefix, chain[-1].output.nbytes


def _equal(features: Tensor, expected: Tensor) -> bool:
    """Whether features are equal up to rounding; of fake tensors device and shape are compared."""
    if features.device != expected.device or features.shape != expected.shape:
        return False
    if not modes.has_values(features):
        return True
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    error = (features.detach() - expected.detach()).double().norm()
    return bool(error <= tolerance * expected.detach().double().norm())


def _trial(modules: list[nn.Module], encode: Encode, batch: Batch) -> tuple[Tensor, list[_Call]]:
    """Encodes a batch; returns its features and the calls that make the frozen beginning.

    modules: the frozen modules, whose calls are noted by hooks that are removed again. There are no
    calls if there is no beginning, see `_chain`.
    """
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        calls.append(_Call(module, args[0] if args else None, output))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.enable_grad(), _nothing_saved():
            features = encode(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return features, _chain(calls)


def _nothing_saved() -> saved_tensors_hooks:
    """Context in which graphs keep no tensors.

    A plan's graphs would keep those of a graph without a backward pass.
    """
    return saved_tensors_hooks(lambda tensor: None, lambda nothing: None)


def _chain(calls: list[_Call]) -> list[_Call]:
    """Returns the calls that make the frozen beginning; none if keeping its output gains nothing.

    calls: of frozen modules, in their order. It gains nothing without matrices. Modules that are
    called twice make no beginning.
    """
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
