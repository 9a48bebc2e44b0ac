"""Calls of the ops whose launches are recorded on fake tensors."""

from typing import Any

from torch import Tensor

from simplclip.selftest.calls import Call
from simplclip.selftest.compare import outputs_of
from support.ops import calls
from support.ops.compare import function_of


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
