"""Predicts the memory of a step by counting two steps on fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.memory import pretend
from simplclip.memory.count import Counter, Usage
from simplclip.memory.engine import Engine
from simplclip.memory.step import Step

STEPS = 2  # in the second step the optimizer's state exists from the beginning


def predict(step: Step, device: torch.device) -> Usage:
    """The memory on `device` during two runs of `step`, whose modules are fake afterwards."""
    # Fallback kernels would run ops without a fake on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, pretend.Fakes(mode, torch.device("cpu")).of, step.batches(whole=False))
    pretend.Fakes(mode, device).into(step.modules)
    for module in step.modules:
        counter.hold([list(module.parameters()), list(module.buffers())], "parameters")
    counter.hold(batches, "batch")
    engine = Engine(lambda gradient: counter.hold(gradient, "gradients"))
    with pretend.fake_step(mode, device), engine.installed(), counter.counting():
        step.place(device, counter)
        _watch(step.optimizer, counter)
        for _ in range(STEPS):
            counter.usage.steps.append(len(counter.usage.events))
            with counter.during("backward", "temporaries"):
                step.run(batches)
        counter.usage.steps.append(len(counter.usage.events))
    return counter.usage


def _watch(optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    parts: list[AbstractContextManager] = []

    def before(*_) -> None:
        parts.append(counter.during("optimizer", "temporaries"))
        parts[-1].__enter__()

    def after(*_) -> None:
        parts.pop().__exit__(None, None, None)
        counter.hold(list(optimizer.state.values()), "optimizer state")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
