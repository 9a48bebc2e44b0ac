"""One run of a step, or of ops, on fake tensors, which predicts memory and counts kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.plan import fake
from simplclip.plan.actual import weights_of
from simplclip.plan.cards import Card
from simplclip.plan.count import Counter, Usage
from simplclip.plan.kernels import Kernel
from simplclip.plan.step import Step


def predict(step: Step, device: torch.device, card: Card | None = None) -> Usage:
    """Predicts the memory and the kernels of one step on `device`, which need not be there.

    Runs it on fake tensors, once the optimizer's state exists: the peak includes it, `kernels` are
    those of the step alone. card: as for `fake_step`. Raises UncountedOp.
    """
    step = copy.copy(step)  # what `place` makes is of this run
    # Fallback kernels would run ops that have no fake implementation on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, fake.faker(mode, torch.device("cpu")), step.batches(real=False))
    engine = fake.Engine(lambda gradient: counter.hold(gradient, "gradients"))
    with fake.fake_weights(step.modules, fake.faker(mode, device)):
        counter.hold(weights_of(step), "parameters")
        counter.hold(batches, "batch")
        with fake.fake_step(mode, device, card), engine.installed(), counter.counting():
            step.place(device, counter)
            counter.hold(weights_of(step), "parameters")
            counter.hold(step.averages, "averages")
            _make_state(step.optimizer, counter)
            counter.usage.kernels.clear()
            step.run(batches)
    return counter.usage


@contextlib.contextmanager
def on_card(card: Card) -> Iterator[list[Kernel]]:
    """Context in which new tensors are fake, and ops of CUDA tensors run as on this card.

    Yields the list to which the ops' kernels are added, and the host's waits for values, which are
    read as 0. Functions of torch are replaced until the end.
    """
    device = torch.device("cuda", 0)
    mode, counter = FakeTensorMode(allow_fallback_kernels=False), Counter(device, waits=True)
    engine = fake.Engine(lambda gradient: None)
    with fake.fake_step(mode, device, card), engine.installed(), counter.counting():
        yield counter.usage.kernels


def _make_state(optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    """Makes the optimizer's state by an update with empty gradients, and counts it by a hook."""

    def begin(*_: object) -> None:
        """Lets the update read the number of its step, by which it may divide, as 1."""
        counter.value = 1.0

    def end(*_: object) -> None:
        """Counts what the update has made."""
        counter.value = None
        counter.hold(list(optimizer.state.values()), "optimizer state")

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            counter.hold(parameter.grad, "gradients")
    optimizer.step()
    optimizer.zero_grad()
