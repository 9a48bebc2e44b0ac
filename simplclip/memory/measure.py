"""The memory of a step, predicted on fake tensors; and peaks of torch's CPU allocator, measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from simplclip import gradient_cache
from simplclip.memory import fake
from simplclip.memory.count import Counter, Usage
from simplclip.memory.step import Step, first_and_last


def predict(step: Step, device: torch.device) -> Usage:
    """Predicts the memory that `step` takes on `device`, where the optimizer's state exists already."""
    # Fallback kernels would run ops that have no fake implementation on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, fake.faker(mode, torch.device("cpu")), step.batches(real=False))
    engine = fake.Engine(lambda gradient: counter.hold(gradient, "gradients"))
    shortened = mock.patch.object(gradient_cache, "backward", first_and_last(gradient_cache.backward))
    with fake.fake_weights(step.modules, fake.faker(mode, device)):
        counter.hold(_weights(step), "parameters")
        counter.hold(batches, "batch")
        with fake.fake_step(mode, device), engine.installed(), shortened, counter.counting():
            step.place(device, counter.during)
            counter.hold(_weights(step), "parameters")
            counter.hold(step.averages, "averages")
            _make_state(step.optimizer, counter)
            with counter.during("backward", "temporaries"):
                step.run(batches)
    return counter.usage


def _make_state(optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    """Makes the optimizer's state by an update, and counts it now and in later updates."""
    phase = ExitStack()

    def after(*_) -> None:
        phase.close()
        counter.hold(list(optimizer.state.values()), "optimizer state")

    optimizer.register_step_pre_hook(lambda *_: phase.enter_context(counter.during("optimizer", "temporaries")))
    optimizer.register_step_post_hook(after)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            counter.hold(parameter.grad, "gradients")
    optimizer.step()
    optimizer.zero_grad()


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes that torch's CPU allocator allocated during `run`, without those that were live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def _weights(step: Step) -> list[Tensor]:
    return [tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())]
