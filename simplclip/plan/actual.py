"""Steps on real tensors, and the memory that they take: what predictions are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:  # what is below needs torch alone
    from simplclip.plan.step import Step

STEPS = 2  # measured ones; in the second one the optimizer's state exists from the beginning


def runner(step: Step, device: torch.device) -> Callable[[], object]:
    """Returns a function that runs the step on real tensors on `device`, with random weights."""
    return _placed(step, device)[1]


def peak_bytes(step: Step, device: torch.device) -> int:
    """Runs the step; returns the peak bytes of torch's allocator on `device`, with parameters, on a
    CPU also the batch.
    """
    before, once = _placed(step, device)

    def run() -> None:
        for _ in range(STEPS):
            once()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in before
    }
    return sum(storages.values()) + cpu_peak_bytes(run)


def _placed(step: Step, device: torch.device) -> tuple[list[Tensor], Callable[[], object]]:
    """Returns the tensors that are in memory before a step on `device`, and a function that runs
    it.
    """
    step = copy.copy(step)  # what `place` makes is of this run
    for module in step.modules:
        fill(module.to_empty(device=device))
    step.place(device, lambda kind: nullcontext())
    batches = step.batches(real=True)
    weights = [
        tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())
    ]
    return tree_leaves([weights, step.averages, batches]), partial(step.run, batches)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Gives a module values with which a step runs."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # of a norm
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            tensor.fill_(1)
        elif name.endswith("attn_mask"):  # of a causal tower, which checks it
            tensor.fill_(-torch.inf).triu_(1)
        elif isinstance(tensor, nn.Parameter):
            tensor.normal_(0, 0.02)
        else:
            tensor.zero_()


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Returns the peak bytes of torch's CPU allocator during `run`, above those live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(
        accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)
    )
