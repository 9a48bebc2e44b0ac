"""Gradient caching: the gradient of a loss over E pairs with the activations of one micro-batch.

    from simplclip import gradient_cache

    terms = gradient_cache.backward(lambda b: model(b["image"], b["text"]), micro_batches, loss, model=model)
    optimizer.step()

Needs nothing else of this library: any model, any loss over features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

    Exact up to rounding; step 1 is the price, one more forward pass.

    Args:
        encode: a micro-batch -> its outputs: a tensor, a sequence of them (handed to `loss` by position) or a mapping (by
            name, so that open_clip's model and loss fit each other). Outputs with two and more dimensions are features
            [m, ...]; they are concatenated along the first, where micro-batches may differ, as image [m, D] and the text
            [m k, D] of several captions do. Outputs with one element (logit scale and bias) are parameters, the same from
            every micro-batch: `loss` gets one and its gradient goes back once. encode is called twice for a micro-batch and
            has to compute the same; it is the place to move one to the device.
        micro_batches: of any kind; read twice, by index.
        loss: (outputs of all E pairs) -> the loss, or terms by name whose sum it is. What it uses beside the outputs, as its
            own parameters, gets its gradient in step 2.
        model: what `check` looks at. In it DistributedDataParallel exchanges gradients in the last backward pass only; encode
            must call that wrapper, and all its parameters must take part in every encode, so that a logit scale belongs to
            its outputs (as in open_clip's forward(image, text)) and not to the closure of `loss`.
        scaler: scales the loss; its step and update stay the caller's.
        keep: micro-batches, the last ones, whose graph is kept from step 1 to 3 instead of encoded again. At least one is
            always encoded again where there are several.

    Returns the terms without autograd; {"loss": ...} of a loss that is one tensor.

    Random numbers: every micro-batch draws the same in both passes, from the generators of the CPU and of CUDA devices, which
    end where steps 1 and 2 alone would leave them. Those of Python and numpy are not watched. Other state that a forward pass
    changes, it changes twice.

    Autocast: that of the caller, in the passes forward. Memory: activations of max(keep, 1) micro-batches, the outputs
    and their gradients, and what `loss` needs. Double backward: no.

    Raises:
        ValueError, TypeError: no micro-batch, outputs of another kind, a model that `check` refuses.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
    """
    if not hasattr(micro_batches, "__getitem__"):
        raise TypeError(f"micro_batches: expected a sequence, it is read twice, got {type(micro_batches).__name__}")
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
            gradients[again - 1][name] = leaf.grad  # [-1] where nothing is encoded again
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
    """Refuses modules that take statistics of the batch they see or keep running ones, since micro-batches change both.

    Raises: ValueError, which names the first such module, as a batch norm in training mode.
    """
    for name, module in model.named_modules():
        running = any(getattr(module, key, None) is not None for key in ("running_mean", "running_var"))
        if module.training and running or isinstance(module, _BatchNorm) and (module.training or not running):
            raise ValueError(
                f"model: expected no statistics of batches, got {type(module).__name__} {name!r} in training mode: "
                "those of a micro-batch are not those of the whole batch, and running ones would count every sample twice. "
                "Put such norms into eval mode (frozen), or take ones without, as LayerNorm and GroupNorm"
            )


def _named(outputs: Outputs) -> Named:
    """Outputs of encode by name or position, checked."""
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


@contextmanager
def _alone(model: nn.Module | None, alone: bool) -> Iterator[None]:
    """No exchange of gradients between ranks where `alone`. DistributedDataParallel decides it in the forward pass."""
    with ExitStack() as stack:
        for module in model.modules() if model is not None and alone else ():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def _generators() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _restore(states: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
