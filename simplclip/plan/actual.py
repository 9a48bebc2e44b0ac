"""Steps on real tensors, and the memory that they take: what predictions are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    """Returns a function that runs the step once, on real tensors on `device`.

    Before, moves the step's modules there in place, with random weights.
    """
    return _place_and_fill(step, device)[1]


def peak_bytes(step: Step, device: torch.device) -> int:
    """Runs the step STEPS times on `device`; returns the peak bytes of torch's allocator there.

    They include parameters, averages and, on a CPU, the batch; on a GPU also all else that is
    allocated there. Moves the step's modules to `device` in place, with random weights, and resets
    the GPU's peak statistics.
    """
    before, once = _place_and_fill(step, device)

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


def _place_and_fill(step: Step, device: torch.device) -> tuple[list[Tensor], Callable[[], object]]:
    """Moves a step to `device`; returns the tensors that it begins with, and what runs it once."""
    step = copy.copy(step)  # what `place` makes is of this run
    for module in step.modules:
        fill(module.to_empty(device=device))
    step.place(device, None)
    batches = step.batches(real=True)
    before = tree_leaves([weights_of(step), step.averages, batches])
    return before, partial(step.run, batches)


def weights_of(step: Step) -> list[Tensor]:
    """Returns the parameters and buffers of all modules of the step."""
    return [
        tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())
    ]


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Overwrites a module's parameters and buffers by values with which a step runs.

    Norms get weights and variances of 1, other parameters normal values, other buffers 0.
    """
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
    """Calls `run` in torch's profiler; returns the peak bytes of torch's CPU allocator in it.

    Bytes that were live before do not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(
        accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)
    )
