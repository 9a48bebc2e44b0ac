"""Calls of the ops whose memory and kernels are predicted on fake tensors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.common.terms import SWEPT as TERMS
from simplclip.plan import count, fake
from simplclip.plan.cards import CARDS
from simplclip.plan.kernels import Kernel
from simplclip.plan.measure import on_card
from simplclip.selftest.calls import Call
from simplclip.selftest.compare import outputs_of
from support.ops import calls
from support.ops.compare import function_of

SIMILARITY = {
    "contrastive": {"terms": ("contrastive",)},
    "pair matching": {"terms": ("contrastive", "pair_matching")},
    "hadamard": {"terms": ("pair_matching",), "plane": "hadamard"},
    "relational": {"terms": ("relational",)},
    "relational, rows only": {"terms": ("relational",), "teacher_width": 80, "symmetric": False},
    "sigmoid": {"terms": ("sigmoid",)},
    "every term": {"terms": TERMS, "plane": "hadamard", "teacher_width": 80},
    "every term, own features": {"terms": TERMS},
}


def similarity_call(
    name: str, n: int = 3000, m: int = 3100, width: int = 64, *, ids: bool = True, **options: Any
) -> Call:
    options = SIMILARITY[name] | options
    return calls.similarity_call(n, m, (m - n) // 2, ids=ids, width=width, **options)


def attention_call(*shape: int, lengths: tuple[int, ...] | None = None) -> Call:
    return calls.of_lengths(calls.attention_call(*shape, causal=True), lengths)


def mlp_call(t: int, c: int, f: int, *, bias: bool = True, **options: Any) -> Call:
    call = calls.mlp_call(t, c, f, c, **options)
    if not bias:
        del call.tensors["fc1_bias"], call.tensors["fc2_bias"]
    return call


def forward_and_backward(
    call: Call, tensors: dict[str, Tensor], frozen: tuple[str, ...] = ()
) -> None:
    for name in call.needed():
        tensors[name].requires_grad_(name not in frozen)
    total = sum(t.sum() for t in outputs_of(function_of(call), call, tensors).values())
    if total.requires_grad:
        total.backward()


def predicted(call: Call, dtype: torch.dtype, device: torch.device) -> count.Counter:
    """Counts the memory of a forward and a backward pass on fake tensors."""
    counter, mode = count.Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    fakes = tree_map_only(Tensor, fake.faker(mode, device), call.typed(dtype))
    counter.hold(fakes, "batch")
    with (
        fake.fake_step(mode, device),
        fake.Engine(lambda gradient: None).installed(),
        counter.counting(),
    ):
        forward_and_backward(call, fakes)
    return counter


def trace(
    run: Callable[[dict[str, Any]], None], tensors: dict[str, Any], card: str = "rtx-3090"
) -> list[Kernel]:
    """Runs `run` with fake CUDA tensors like `tensors` on a card, and returns the kernels."""

    def like(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with on_card(CARDS[card]) as kernels:
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
