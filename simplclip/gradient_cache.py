"""Gradient caching: the gradient of a loss over E pairs with the memory of one micro-batch.

    from simplclip import gradient_cache

    def encode(batch):
        return model(batch["image"], batch["text"])

    terms = gradient_cache.backward(encode, micro_batches, loss, model=model)
    optimizer.step()

It works with any model and any loss over features, and needs no other part of this library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip.common import generators
from simplclip.common.errors import InputError
from simplclip.ops import checks

__all__ = ["backward", "check"]

MicroBatch = TypeVar("MicroBatch")
Outputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Encode = Callable[[MicroBatch], Outputs]
Named = dict[Any, Tensor]  # outputs by their name, or by their position


def backward(
    encode: Encode | Mapping[str, Encode],
    micro_batches: Any,
    loss: Callable[..., Any],
    *,
    model: nn.Module | None = None,
    scaler: GradScaler | None = None,
) -> dict[str, Tensor]:
    """Adds the gradients of the loss over all micro-batches together to `.grad`:

        1. features of every micro-batch, without autograd    x_b = encode(b)
        2. one loss over all of them, and its gradients       L = loss(cat x_b),  g = dL/dx
        3. every micro-batch again, with autograd             encode(b).backward(its rows of g)

    The result is exact up to rounding. It costs one more forward pass, step 1, but for the last
    micro-batch (of each tower), whose graph is kept from step 1 to step 3.

    Args:
        encode: maps a micro-batch to its outputs: a tensor, a sequence of tensors (passed to `loss`
            by position) or a mapping (passed by name, so that open_clip's model and loss fit each
            other). Outputs with two or more dimensions are features [m, ...]. They are concatenated
            along the first dimension, whose size may differ between micro-batches and between
            outputs, e.g. image [m, D] and text [m k, D] with several captions. Outputs with one
            element (logit scale and bias) must be the same for every micro-batch: `loss` gets one
            of them, and its gradient is propagated once. Features may be constants in some
            micro-batches, but not only in the last one. encode is called twice for a micro-batch
            and must compute the same both times; it may move the micro-batch to the device. If the
            towers have micro-batches of their own: a mapping of such functions. A function returns
            one tensor, which is named by the function's key, or a mapping of outputs.
        micro_batches: a sequence of micro-batches of any type, which is read twice; for several
            towers, a mapping of such sequences, like `encode`. Their lengths may differ.
            images.split(64) makes such a sequence of a tensor.
        loss: maps the outputs of all E pairs to the loss, to a mapping of terms whose sum is the
            loss, or to (loss, terms) like the method `terms` of simplclip.losses. Parameters of its
            own get their gradients in step 2.
        model: the module that `check` checks. If it contains DistributedDataParallel, the ranks
            exchange gradients only in the last backward pass of each tower. Towers that share a
            wrapper have one last backward pass, of the last micro-batches of all towers; such a
            wrapper must not have find_unused_parameters=True. encode must call the wrapper, and the
            towers use all its parameters: a logit scale must be an output of encode (as in
            open_clip's forward(image, text)), not a variable that `loss` captures.
            static_graph=True is not supported, since torch then exchanges in the first backward
            pass.
        scaler: scales the loss; the caller calls its step and update.

    Returns the detached terms; {"loss": ...} if `loss` returns one tensor.

    Random numbers: a micro-batch draws the same numbers in both passes from the generators of the
    CPU and of CUDA devices, one tower after the other. Afterwards these are in the state that steps
    1 and 2 alone would leave. The generators of Python and numpy are not restored. Other state that
    a forward pass changes is changed twice.

    Autocast: the forward passes run under the caller's. Memory: activations of one micro-batch (of
    each tower), the outputs and their gradients, and what `loss` needs. Where `loss` has only
    sigmoid terms of simplclip, step 2 is one sweep that computes the value and the gradients.
    Double backward is not supported.

    Raises:
        ValueError, TypeError: an argument, an output or what `loss` returns is not valid, or
            `check` rejects the model. No gradient has changed then.
        InputError: an output is a constant in the last micro-batch alone, which step 3 finds.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup", arXiv 2101.06983.
    """
    if not torch.is_grad_enabled():
        raise InputError("backward: expected autograd, got a call under no_grad or inference_mode")
    encoders = _encoders(encode, micro_batches)
    checks.check_instance("scaler", scaler, GradScaler | None, "a torch.amp.GradScaler or None")
    if model is not None:
        check(model)
    exchange = _Exchange(model, encoders)
    leaves: Named = {}
    for encoder in encoders:
        encoder.encode_once(exchange)
        for name, leaf in encoder.leaves().items():
            if name in leaves:
                raise ValueError(
                    f"{encoder.label}: expected outputs that no other tower has, got {name!r}"
                )
            # of frozen towers and of teachers the loss need not compute gradients
            leaves[name] = leaf.requires_grad_(encoder.needs_gradient[name])

    result = loss(*leaves.values()) if 0 in leaves else loss(**leaves)
    total, terms = _loss_and_terms(result)
    if not total.requires_grad:
        got = "a constant: no output of encode requires a gradient, or loss detaches it"
        raise InputError(f"loss: expected a value with a gradient, got {got}")
    if scaler is not None:
        total = scaler.scale(total)
    with _autocast_off(total):
        total.backward()
    end = generators.states()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    exchange.encode_again(gradients)
    generators.restore(end)
    return {name: term.detach() for name, term in terms.items()}


def _loss_and_terms(result: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Returns the loss [] and its terms by name, from what the user's `loss` returned."""
    match result:
        case (total, Mapping() as terms):
            summands = [total]
        case Mapping() as terms:
            summands = list(terms.values())
        case _:
            terms, summands = {"loss": result}, [result]
    tensors = all(isinstance(value, Tensor) for value in (*summands, *terms.values()))
    if not tensors or {value.numel() for value in summands} != {1}:
        got = checks.shape_of(result) if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(
            "loss: expected a tensor [], a mapping of them (as losses return with "
            f"output_dict=True) or (loss, mapping), got {got}"
        )
    return sum(summands), terms


class _Encoder:
    """The encoder of a tower, its micro-batches, and the state that step 1 keeps for step 3."""

    def __init__(self, key: str | None, encode: Encode, micro_batches: Any) -> None:
        """Encodes nothing yet; key: the tower's name, None if it is the only one."""
        self.key = key
        self.encode = encode
        suffix = "" if key is None else f"[{key!r}]"
        self.label = f"encode{suffix}"
        if not hasattr(micro_batches, "__getitem__"):
            got = type(micro_batches).__name__
            raise TypeError(
                f"micro_batches{suffix}: expected a sequence, since it is read twice, got {got}"
            )
        self.micro_batches = micro_batches
        self.count = len(micro_batches)
        if not self.count:
            raise ValueError(f"micro_batches{suffix}: expected at least one, got none")
        # micro-batches that are encoded again in step 3, all but the last
        self.recomputed = self.count - 1
        self.states: list[generators.States] = []
        self.outputs: list[Named] = []
        self.rows: list[dict[Any, int]] = []  # of the features of each micro-batch
        self.last_outputs: Named = {}
        self.needs_gradient: dict[Any, bool] = {}  # by output, in the last micro-batch

    def encode_once(self, exchange: _Exchange) -> None:
        """Encodes each micro-batch, all but the last without autograd (step 1)."""
        first: dict[Any, list] = {}
        for index in range(self.count):
            self.states.append(generators.states())
            with (
                torch.set_grad_enabled(index == self.recomputed),
                exchange.no_sync(self in exchange.recomputing),
            ):
                outputs = self._outputs(self.micro_batches[index])
            shapes: dict[Any, list] = {name: [] for name in outputs}
            for name, output in outputs.items():
                if output.dim() > 1:
                    shapes[name] = ["m", *output.shape[1:]]
            first = first or shapes
            if shapes != first:
                raise ValueError(
                    f"{self.label}: expected the outputs of the first micro-batch, {first}, got "
                    f"{shapes}"
                )
            if index == self.recomputed:
                self.last_outputs = outputs
                self.needs_gradient = {name: t.requires_grad for name, t in outputs.items()}
            self.outputs.append({name: output.detach() for name, output in outputs.items()})
            rows = {name: len(output) for name, output in outputs.items() if output.dim() > 1}
            self.rows.append(rows)

    def leaves(self) -> Named:
        """Returns all micro-batches' outputs by name, and forgets them.

        Features are concatenated [sum of m, ...]; of scalars it is that of the last micro-batch.
        """
        outputs = self.outputs
        self.outputs = []
        leaves = dict(outputs[-1])
        for name in self.rows[0]:
            leaves[name] = torch.cat([named[name] for named in outputs])
        return leaves

    def encode_again(self, exchange: _Exchange, gradients: Named) -> None:
        """Backpropagates all micro-batches but the one that `last` returns (step 3).

        gradients: of `leaves`, by name. Ranks exchange nothing.
        """
        self.gradients: list[Named] = [{} for _ in self.rows]
        for name in self.names:
            if name in gradients and name in self.rows[0]:
                rows = [rows[name] for rows in self.rows]
                for named, gradient in zip(self.gradients, gradients[name].split(rows)):
                    named[name] = gradient
            elif name in gradients:
                # The micro-batch that `last` returns, which is at -1 if none is encoded again.
                self.gradients[self.recomputed - 1][name] = gradients[name]
        with exchange.no_sync(True):
            if self.recomputed:
                _backpropagate([self._take_last_outputs()])
            for index in range(self.recomputed - 1):
                _backpropagate([self._encoded_again(index)])

    def last(self) -> tuple[Named, Named]:
        """Returns outputs and gradients of the last micro-batch of step 3, after `encode_again`."""
        if not self.recomputed:
            return self._take_last_outputs()
        return self._encoded_again(self.recomputed - 1)

    def _take_last_outputs(self) -> tuple[Named, Named]:
        """Returns the last micro-batch's outputs of step 1, with graph, and their gradients."""
        outputs = self.last_outputs
        self.last_outputs = {}  # so that its graph does not outlive its backward pass
        return outputs, self.gradients[-1]

    def _encoded_again(self, index: int) -> tuple[Named, Named]:
        """Encodes a micro-batch with step 1's random numbers; returns outputs and gradients."""
        generators.restore(self.states[index])
        outputs = self._outputs(self.micro_batches[index])
        for name, output in outputs.items():
            needed = output.requires_grad
            # the gradient would be lost
            if needed != self.needs_gradient[name] and (needed or output.dim() < 2):
                constant = self.recomputed if needed else index
                raise InputError(
                    f"output {name!r} of {self.label}: expected one that requires a gradient in "
                    f"every micro-batch, got a constant in micro-batch {constant}"
                )
        return outputs, self.gradients[index]

    def _outputs(self, batch: Any) -> Named:
        """Returns the outputs of a micro-batch by name or, of a sequence, by position from 0."""
        outputs: Any = self.encode(batch)
        kinds: Any = Mapping
        several = "a mapping"
        name: Any = self.key
        if self.key is None:
            kinds = Mapping | Sequence
            several = "a sequence or mapping"
            name = 0
        if isinstance(outputs, Tensor):
            outputs = {name: outputs}
        if not isinstance(outputs, kinds) or not outputs:
            got = type(outputs).__name__
            raise TypeError(f"{self.label}: expected a tensor, or {several} of them, got {got}")
        if not isinstance(outputs, Mapping):
            outputs = dict(enumerate(outputs))
        for name, output in outputs.items():
            label = f"output {name!r} of {self.label}"
            checks.check_floating(label, output)
            if output.dim() < 2 and output.numel() != 1:
                raise ValueError(
                    f"{label}: expected features [m, ...] or one element, got shape "
                    f"{checks.shape_of(output)}"
                )
        self.names = list(outputs)
        return dict(outputs)


def _encoders(encode: Any, micro_batches: Any) -> list[_Encoder]:
    """Returns an encoder for each item of a mapping `encode`, or the only one of a function."""
    if callable(encode):
        return [_Encoder(None, encode, micro_batches)]
    if not isinstance(encode, Mapping) or not encode:
        raise TypeError(
            f"encode: expected a function, or a mapping of them, got {type(encode).__name__}"
        )
    if not isinstance(micro_batches, Mapping) or set(micro_batches) != set(encode):
        got = type(micro_batches).__name__
        if isinstance(micro_batches, Mapping):
            got += f" {list(micro_batches)}"
        raise ValueError(
            f"micro_batches: expected one for each tower in a mapping, {list(encode)}, got {got}"
        )
    return [_Encoder(key, function, micro_batches[key]) for key, function in encode.items()]


def check(model: nn.Module) -> None:
    """Raises InputError for a module that uses statistics of its batch, or updates running ones.

    Micro-batches change both. The message of the error, a ValueError, names the first such module,
    e.g. a batch norm in training mode. Changes nothing.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    for name, module in model.named_modules():
        mean = getattr(module, "running_mean", None)
        variance = getattr(module, "running_var", None)
        running = mean is not None or variance is not None
        batch_norm = isinstance(module, _BatchNorm)
        updates = module.training and (running or batch_norm)
        if updates or (batch_norm and not running):
            raise InputError(
                f"model: expected no batch statistics, got {type(module).__name__} {name!r} in "
                "training mode: statistics of a micro-batch are not those of the whole batch, and "
                "running statistics would count every sample twice. Put such norms into eval mode "
                "(model.freeze_norms=true in a config), or use others, e.g. LayerNorm or GroupNorm"
            )


class _Exchange:
    """The choice, in forward passes, of backward passes in which DDP exchanges gradients."""

    def __init__(self, model: nn.Module | None, encoders: list[_Encoder]) -> None:
        """Finds the DistributedDataParallel wrappers in a model; None means that there are none."""
        self.wrappers: list[DistributedDataParallel] = []
        if model is not None:
            self.wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.encoders = encoders
        # that exchange for a micro-batch of step 3, not for the one whose graph step 1 keeps
        self.recomputing = [e for e in encoders if e.recomputed]
        self.together = len(self.wrappers) == 1 and len(encoders) > 1  # towers that share a wrapper
        if self.together and self.recomputing:
            self.recomputing = encoders
        if self.together and self.wrappers[0].find_unused_parameters:
            # DDP would count one tower's parameters as finished in the other's forward pass.
            raise InputError(
                "model: expected find_unused_parameters=False of a wrapper that both towers share, "
                "got True"
            )

    def no_sync(self, enabled: bool) -> ExitStack:
        """Returns an entered context in which backward exchanges no gradients, if enabled."""
        stack = ExitStack()
        if enabled:
            for wrapper in self.wrappers:
                stack.enter_context(wrapper.no_sync())
        return stack

    def encode_again(self, gradients: Named) -> None:
        """Backpropagates every micro-batch of all towers; the last pass exchanges gradients."""
        for encoder in self.encoders:
            encoder.encode_again(self, gradients)
            if not self.together:
                _backpropagate([encoder.last()])
        if self.together:
            _backpropagate([encoder.last() for encoder in self.encoders])


def _backpropagate(micro_batches: list[tuple[Named, Named]]) -> None:
    """Backpropagates (outputs, gradients) of micro-batches in one pass; constants are left out."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for named_outputs, named_gradients in micro_batches:
        for name, gradient in named_gradients.items():
            if named_outputs[name].requires_grad:
                outputs.append(named_outputs[name])
                gradients.append(gradient)
    if outputs:
        with _autocast_off(outputs[0]):
            torch.autograd.backward(outputs, gradients)


def _autocast_off(tensor: Tensor) -> torch.autocast:
    """Returns a context without autocast, which would cast backward's float32 products."""
    return torch.autocast(tensor.device.type, enabled=False)
