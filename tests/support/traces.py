"""What a step of an op starts on a card: benchmarks.bound's trace of it on fake CUDA tensors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.bound.trace import Step, on_card
from simplclip.common.cards import CARDS


def trace(run: Callable[[dict[str, Any]], None], tensors: dict[str, Any]) -> list[Step]:
    """Runs `run` with fake CUDA tensors like the given ones."""
    with on_card(CARDS["rtx-3090"]) as found:
        like = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")  # noqa: E731
        run(tree_map_only(Tensor, like, tensors))
    return found.steps


def names(steps: list[Step], *kinds: str) -> Counter[str]:
    """How often each kernel is started: of torch, of this library in "triton" or "cuda"; or each wait for the "host"."""
    return Counter(step.name for step in steps if step.kind in kinds)
