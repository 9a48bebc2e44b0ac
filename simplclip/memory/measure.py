"""The memory of a step: predicted by counting two steps on fake tensors, or measured by two steps on real ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.memory import fake
from simplclip.memory.count import Counter, Usage
from simplclip.memory.exchange import pretended
from simplclip.memory.step import Step

STEPS = 2  # in the second step the optimizer's state exists from the beginning


def predict(step: Step, device: torch.device, ranks: int = 1) -> Usage:
    """Predicts the memory on `device` during two runs of `step`, whose weights are fake afterwards.

    ranks: the number of ranks, one of which runs the step. The step's loss must have this world_size.
    """
    # Fallback kernels would run ops that have no fake implementation on real tensors.
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    batches = tree_map_only(Tensor, fake.faker(mode, torch.device("cpu")), step.batches(real=False))
    of_weights = fake.faker(mode, device)
    for module in (inner for outer in step.modules for inner in outer.modules()):
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in both:
            tensors.update({name: of_weights(tensor) for name, tensor in tensors.items() if tensor is not None})
    counter.hold(_weights(step), "parameters")
    counter.hold(batches, "batch")
    engine = fake.Engine(lambda gradient: counter.hold(gradient, "gradients"))
    with fake.fake_step(mode, device), engine.installed(), pretended(ranks), counter.counting():
        step.place(device, counter.during)
        trained = [p for group in step.optimizer.param_groups for p in group["params"]] if ranks > 1 else []
        buckets = [torch.empty_like(p) for p in trained]  # of DistributedDataParallel, in addition to the gradients
        counter.hold(buckets, "gradients")
        _watch(step.optimizer, counter)
        for _ in range(STEPS):
            counter.usage.steps.append(len(counter.usage.events))
            with counter.during("backward", "temporaries"):
                step.run(batches)
        counter.usage.steps.append(len(counter.usage.events))
    return counter.usage


def _watch(optimizer: torch.optim.Optimizer, counter: Counter) -> None:
    phase = ExitStack()

    def after(*_) -> None:
        phase.close()
        counter.hold(list(optimizer.state.values()), "optimizer state")

    optimizer.register_step_pre_hook(lambda *_: phase.enter_context(counter.during("optimizer", "temporaries")))
    optimizer.register_step_post_hook(after)


def measure(step: Step, device: torch.device) -> int:
    """Runs the step; returns the peak bytes of torch's allocator on `device`, with parameters, on a CPU also the batch."""
    step.materialize(device)
    step.place(device, lambda phase, kind: nullcontext())
    batches = step.batches(real=True)

    def run() -> None:
        for _ in range(STEPS):
            step.run(batches)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves([_weights(step), batches])}
    return sum(storages.values()) + cpu_peak_bytes(run)


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes that torch's CPU allocator allocated during `run`, without those that were live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def _weights(step: Step) -> list[Tensor]:
    return [t for module in step.modules for t in (*module.parameters(), *module.buffers())]
