"""Measures the memory of a step by two steps on real tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from simplclip.memory.predict import STEPS
from simplclip.memory.step import Step


def measure(step: Step, device: torch.device) -> int:
    """Peak bytes of torch's allocator on `device`, including parameters, and on a CPU also the batch."""
    step.materialize(device)
    step.place(device)
    batches = step.batches(whole=True)

    def run() -> None:
        for _ in range(STEPS):
            step.run(batches)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(step, batches)}
    return sum(held.values()) + cpu_peak_bytes(run)


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes that torch's CPU allocator allocated during `run`, without those that were live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def _tensors(step: Step, batches: object) -> list[Tensor]:
    weights = [[list(module.parameters()), list(module.buffers())] for module in step.modules]
    return [leaf for leaf in tree_leaves([weights, batches]) if isinstance(leaf, Tensor)]
