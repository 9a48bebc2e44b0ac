"""Calls of the ops whose memory is compared with stated or predicted memory."""

import calls
import torch
from calls import TERMS, Call
from compare import function_of, outputs_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from simplclip.plan import fake
from simplclip.plan.count import Counter

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
    name: str, n: int = 3000, m: int = 3100, width: int = 64, *, ids: bool = True, **options
) -> Call:
    return calls.similarity_call(
        n, m, (m - n) // 2, ids=ids, width=width, **SIMILARITY[name], **options
    )


def attention_call(*shape: int, lengths: tuple[int, ...] | None = None) -> Call:
    return calls.of_lengths(calls.attention_call(*shape, causal=True), lengths)


def mlp_call(t: int, c: int, f: int, *, bias: bool = True, **options) -> Call:
    call = calls.mlp_call(t, c, f, c, **options)
    call.tensors = {
        name: tensor for name, tensor in call.tensors.items() if bias or not name.endswith("bias")
    }
    return call


def forward_and_backward(
    call: Call, tensors: dict[str, torch.Tensor], frozen: tuple[str, ...] = ()
) -> None:
    for name in call.needed():
        tensors[name].requires_grad_(name not in frozen)
    total = sum(t.sum() for t in outputs_of(function_of(call), call, tensors).values())
    if total.requires_grad:
        total.backward()


def predicted(call: Call, dtype: torch.dtype, device: torch.device) -> Counter:
    """Counts the memory of a forward and a backward pass on fake tensors."""
    counter, mode = Counter(device), FakeTensorMode(allow_fallback_kernels=False)
    fakes = tree_map_only(torch.Tensor, fake.faker(mode, device), call.typed(dtype))
    counter.hold(fakes, "batch")
    with (
        fake.fake_step(mode, device),
        fake.Engine(lambda gradient: None).installed(),
        counter.counting(),
    ):
        forward_and_backward(call, fakes)
    return counter
