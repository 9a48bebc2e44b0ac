"""The kernels that a step of an op starts on a card, by benchmarks.bound's trace on fake CUDA tensors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.bound.cards import CARDS
from benchmarks.bound.trace import Step, on_card


def trace(run: Callable[[dict[str, Any]], None], tensors: dict[str, Any]) -> list[Step]:
    """Runs `run` with fake CUDA tensors like `tensors`, and returns the trace."""
    with on_card(CARDS["rtx-3090"]) as traced:
        like = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")  # noqa: E731
        run(tree_map_only(Tensor, like, tensors))
    return traced.steps


def names(steps: list[Step], *kinds: str) -> Counter[str]:
    """Counts the starts of each kernel, or the waits. kinds: "torch", "triton" or "cuda" for kernels, "host" for waits."""
    return Counter(step.name for step in steps if step.kind in kinds)
