"""The kernels that a step of an op starts on a card, counted on fake CUDA tensors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.cards.bound import on_card
from simplclip.plan.cards import CARDS
from simplclip.plan.kernels import Kernel


def trace(run: Callable[[dict[str, Any]], None], tensors: dict[str, Any]) -> list[Kernel]:
    """Runs `run` with fake CUDA tensors like `tensors`, and returns the kernels."""
    with on_card(CARDS["rtx-3090"]) as kernels:
        like = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")  # noqa: E731
        run(tree_map_only(Tensor, like, tensors))
    return kernels


def names(steps: list[Kernel], *kinds: str) -> Counter[str]:
    """Counts the starts of each kernel, or the waits. kinds: "torch", "triton" or "cuda" for
    kernels, "host" for waits.
    """
    counts: Counter[str] = Counter()
    for step in steps:
        if step.by in kinds:
            counts[step.name] += step.times
    return counts
