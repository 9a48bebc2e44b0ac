"""One run of a step, or of ops, on fake tensors, which predicts memory and counts kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip import gradient_cache
from simplclip.plan import fake
from simplclip.plan.cards import Card
from simplclip.plan.count import Counter, Usage
from simplclip.plan.kernels import Kernel
from simplclip.plan.step import Step, first_and_last


def predict(step: Step, device: torch.device, card: Card | None = None) -> Usage:
    """Predicts what `step` takes on `device`, where the optimizer's state exists already. card: as
    for `fake_step`.
    """
    step = copy.copy(step)  # what `place` makes is of this run
    # Fallback kernels would run ops that have no fake implementation on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, fake.faker(mode, torch.device("cpu")), step.batches(real=False))
    engine = fake.Engine(lambda gradient: counter.hold(gradient, "gradients"))
    shortened = mock.patch.object(
        gradient_cache,
        "backward",
        first_and_last(gradient_cache.backward, counter.repeat, step.skip),
    )
    with fake.fake_weights(step.modules, fake.faker(mode, device)):
        counter.hold(_weights(step), "parameters")
        counter.hold(batches, "batch")
        with fake.fake_step(mode, device, card), engine.installed(), shortened, counter.counting():
            step.place(device, counter.during)
            counter.hold(_weights(step), "parameters")
            counter.hold(step.averages, "averages")
            _make_state(step.optimizer, counter)
            counter.usage.kernels.clear()
            step.run(batches)
    return counter.usage


@contextlib.contextmanager
def on_card(card: Card) -> Iterator[list[Kernel]]:
    """Context in which ops of fake CUDA tensors run as on this card; yields the list to which their
    kernels are added.
    """
    device = torch.device("cuda", 0)
    mode, counter = FakeTensorMode(allow_fallback_kernels=False), Counter(device, waits=True)
    engine = fake.Engine(lambda gradient: None)
    with fake.fake_step(mode, device, card), engine.installed(), counter.counting():
        yield counter.usage.kernels


def _make_state(optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    """Makes the optimizer's state by an update, and counts it now and in later updates."""
    optimizer.register_step_post_hook(
        lambda *_: counter.hold(list(optimizer.state.values()), "optimizer state")
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            counter.hold(parameter.grad, "gradients")
    optimizer.step()
    optimizer.zero_grad()


def _weights(step: Step) -> list[Tensor]:
    return [
        tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())
    ]
