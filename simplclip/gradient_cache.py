"""Gradient caching: the gradient of a loss over E pairs, with the activations of one micro-batch in memory.

    from simplclip import gradient_cache

    terms = gradient_cache.backward(lambda b: model(b["image"], b["text"]), micro_batches, loss, model=model)
    optimizer.step()

It works with any model and any loss over features, and needs no other part of this library.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from simplclip.ops import checks

__all__ = ["backward", "check"]

MicroBatch = TypeVar("MicroBatch")
Outputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Named = dict[Any, Tensor]  # by name, or by position


def backward(
    encode: Callable[[MicroBatch], Outputs],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[..., Tensor | Mapping[str, Tensor]],
    *,
    model: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    keep: int = 1,
) -> dict[str, Tensor]:
    """Adds to `.grad` what one backward pass of the loss over all micro-batches together would add:

        1. features of every micro-batch, without autograd            x_b = encode(b)
        2. one loss over all of them, and its gradients               L = loss(cat x_b),  g = dL/dx
        3. every micro-batch again, with autograd                     encode(b) backpropagated from its rows of g

    The result is exact up to rounding. It costs one more forward pass, step 1.

    Args:
        encode: maps a micro-batch to its outputs: a tensor, a sequence of tensors (passed to `loss` by position) or a mapping
            (passed by name, so that open_clip's model and loss fit each other). Outputs with two or more dimensions are
            features [m, ...]. They are concatenated along the first dimension, whose size may differ between micro-batches
            and between outputs, e.g. image [m, D] and text [m k, D] with several captions. Outputs with one element (logit
            scale and bias) must be the same for every micro-batch: `loss` gets one of them, and its gradient is propagated
            once. encode is called twice for a micro-batch and must compute the same both times; it may move the
            micro-batch to the device.
        micro_batches: a sequence of micro-batches of any type, which is read twice.
        loss: maps the outputs of all E pairs to the loss, or to a mapping of terms whose sum is the loss. Parameters of its
            own get their gradients in step 2.
        model: the module that `check` checks. If it contains DistributedDataParallel, the ranks exchange gradients in the
            last backward pass only. Then encode must call that wrapper and use all its parameters: a logit scale must be an
            output of encode (as in open_clip's forward(image, text)), not a variable that `loss` captures.
        scaler: scales the loss; the caller calls its step and update.
        keep: the number of last micro-batches whose graph is kept from step 1 to step 3, so that they are not encoded again.
            If there are several micro-batches, at least one is always encoded again.

    Returns the detached terms; {"loss": ...} if `loss` returns one tensor.

    Random numbers: a micro-batch draws the same numbers in both passes from the generators of the CPU and of CUDA devices.
    Afterwards these are in the state that steps 1 and 2 alone would leave. The generators of Python and numpy are not
    restored. Other state that a forward pass changes is changed twice.

    Autocast: the forward passes run under the caller's. Memory: activations of max(keep, 1) micro-batches, the outputs
    and their gradients, and what `loss` needs. Double backward is not supported.

    Raises:
        ValueError, TypeError: there is no micro-batch, the outputs have another type or shape, or `check` rejects the model.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
    """
    if not hasattr(micro_batches, "__getitem__"):
        raise TypeError(f"micro_batches: expected a sequence, since it is read twice, got {type(micro_batches).__name__}")
    count = len(micro_batches)
    if not count:
        raise ValueError("micro_batches: expected at least one, got none")
    if keep < 0:
        raise ValueError(f"keep: expected a number of micro-batches, 0 or more, got {keep}")
    if model is not None:
        check(model)
    again = max(count - keep, min(count - 1, 1))
    states: list[tuple[Tensor, list[Tensor]]] = []
    parts: list[Named] = []
    kept: list[Named] = []
    for index in range(count):
        states.append(_generators())
        with torch.set_grad_enabled(index >= again), _alone(model, count > 1):
            outputs = _named(encode(micro_batches[index]))
        if parts and outputs.keys() != parts[0].keys():
            raise ValueError(f"encode: expected the outputs of the first micro-batch, {list(parts[0])}, got {list(outputs)}")
        if index >= again:
            kept.append(outputs)
        parts.append({name: output.detach() for name, output in outputs.items()})
    rows = [{name: len(part) for name, part in of_one.items() if part.dim() > 1} for of_one in parts]
    leaves = {
        name: (torch.cat([of_one[name] for of_one in parts]) if name in rows[0] else last).requires_grad_()
        for name, last in parts[-1].items()
    }
    del parts, outputs

    terms = loss(**leaves) if isinstance(next(iter(leaves)), str) else loss(*leaves.values())
    terms = terms if isinstance(terms, Mapping) else {"loss": terms}
    total: Any = sum(terms.values())
    total = total if scaler is None else scaler.scale(total)
    with _autocast_off(total):
        total.backward()
    end = _generators()

    gradients: list[Named] = [{} for _ in rows]
    for name, leaf in leaves.items():
        if leaf.grad is not None and name in rows[0]:
            for of_one, gradient in zip(gradients, leaf.grad.split([m[name] for m in rows])):
                of_one[name] = gradient
        elif leaf.grad is not None:
            gradients[again - 1][name] = leaf.grad  # the last one where nothing is encoded again
    for index in range(again, count):
        with _alone(model, count > 1):
            _backpropagate(kept.pop(0), gradients[index])
    for index in range(again):
        _restore(states[index])
        with _alone(model, index < again - 1):
            _backpropagate(_named(encode(micro_batches[index])), gradients[index])
    _restore(end)
    return {name: term.detach() for name, term in terms.items()}


def check(model: nn.Module) -> None:
    """Rejects modules that use statistics of their batch or update running ones, since micro-batches change both.

    Raises: ValueError that names the first such module, e.g. a batch norm in training mode.
    """
    for name, module in model.named_modules():
        running = any(getattr(module, key, None) is not None for key in ("running_mean", "running_var"))
        if module.training and running or isinstance(module, _BatchNorm) and (module.training or not running):
            raise ValueError(
                f"model: expected no batch statistics, got {type(module).__name__} {name!r} in training mode: statistics "
                "of a micro-batch are not those of the whole batch, and running statistics would count every sample twice. "
                "Put such norms into eval mode (frozen), or use norms without batch statistics, e.g. LayerNorm or GroupNorm"
            )


def _named(outputs: Outputs) -> Named:
    """Checks the outputs of encode and returns them by name or by position."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(outputs, (Mapping, Sequence)) or not outputs:
        raise TypeError(f"encode: expected a tensor, or a sequence or mapping of them, got {type(outputs).__name__}")
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    for name, output in named.items():
        checks.floating(f"output {name!r} of encode", output)
        if output.dim() < 2 and output.numel() != 1:
            shape = checks.shape_of(output)
            raise ValueError(f"output {name!r} of encode: expected features [m, ...] or one element, got shape {shape}")
    return named


def _backpropagate(outputs: Named, gradients: Named) -> None:
    names = [name for name in gradients if outputs[name].requires_grad]
    if names:
        with _autocast_off(outputs[names[0]]):
            torch.autograd.backward([outputs[name] for name in names], [gradients[name] for name in names])


def _autocast_off(t: Tensor) -> torch.autocast:
    """Backward passes run in the dtypes of the forward passes; under autocast float32 products would be cast."""
    return torch.autocast(t.device.type, enabled=False)


def _alone(model: nn.Module | None, alone: bool) -> ExitStack:
    """Disables the exchange of gradients between ranks if `alone`; DistributedDataParallel decides in the forward pass."""
    stack = ExitStack()
    for module in model.modules() if model is not None and alone else ():
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
    return stack


def _generators() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _restore(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1])
