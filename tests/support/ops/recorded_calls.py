"""Calls of the ops whose launches are recorded on fake tensors."""

from typing import Any

from torch import Tensor

from simplclip.common.terms import SWEPT as TERMS
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
