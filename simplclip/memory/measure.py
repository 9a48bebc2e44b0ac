"""The memory of a step: predicted on fake tensors, or measured on real ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import accumulate
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip import gradient_cache
from simplclip.memory import fake
from simplclip.memory.count import Counter, Usage
from simplclip.memory.step import Running, Step, first_and_last

STEPS = 2  # measured ones; in the second one the optimizer's state exists from the beginning


def predict(step: Step, device: torch.device) -> Usage:
    """Predicts the memory that `step` takes on `device`, where the optimizer's state exists already."""
    # Fallback kernels would run ops that have no fake implementation on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, fake.faker(mode, torch.device("cpu")), step.batches(real=False))
    running = step.start()
    engine = fake.Engine(lambda gradient: counter.hold(gradient, "gradients"))
    shortened = mock.patch.object(gradient_cache, "backward", first_and_last(gradient_cache.backward))
    with fake.fake_weights(running.modules, fake.faker(mode, device)):
        counter.hold(_weights(running), "parameters")
        counter.hold(batches, "batch")
        with fake.fake_step(mode, device), engine.installed(), shortened, counter.counting():
            running.place(device, counter.during)
            counter.hold(_weights(running), "parameters")
            counter.hold(running.averages, "averages")
            _make_state(running.optimizer, counter)
            with counter.during("backward", "temporaries"):
                running.run(batches)
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


def runner(step: Step, device: torch.device) -> Callable[[], object]:
    """Returns a function that runs the step on real tensors, with weights that are random."""
    return _placed(step, device)[1]


def _placed(step: Step, device: torch.device) -> tuple[list[Tensor], Callable[[], object]]:
    """Returns the tensors that are in memory before a step on `device`, and a function that runs it."""
    running = step.start()
    for module in running.modules:
        _fill(module.to_empty(device=device))
    running.place(device, lambda phase, kind: nullcontext())
    batches = step.batches(real=True)
    return tree_leaves([_weights(running), running.averages, batches]), partial(running.run, batches)


def measure(step: Step, device: torch.device) -> int:
    """Runs the step; returns the peak bytes of torch's allocator on `device`, with parameters, on a CPU also the batch."""
    before, once = _placed(step, device)

    def run() -> None:
        for _ in range(STEPS):
            once()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in before}
    return sum(storages.values()) + cpu_peak_bytes(run)


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes that torch's CPU allocator allocated during `run`, without those that were live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Gives a module values with which a step runs."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):  # of a norm
            tensor.fill_(1)
        elif name.endswith("attn_mask"):  # of a causal tower, which checks it
            tensor.fill_(-torch.inf).triu_(1)
        elif isinstance(tensor, nn.Parameter):
            tensor.normal_(0, 0.02)
        else:
            tensor.zero_()


def _weights(running: Running) -> list[Tensor]:
    return [tensor for module in running.modules for tensor in (*module.parameters(), *module.buffers())]
