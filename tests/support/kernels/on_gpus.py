"""Calls on one of the two GPUs of ptx/gpus.py while the other one is the current device.

    on_gpus.py NAME...    prints a line of JSON for each of these CASES: what is wrong, or ""
    on_gpus.py DEVICE/NAME...    the same on GPU 0; the default is 1

What is wrong may be a result, a hazard, the device or the stream of a kernel.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ptx import gpus
from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.common.terms import SWEPT as TERMS
from simplclip.kernels.runtime import architecture_and_processors
from simplclip.ops import backends, registry
from simplclip.ops.attention import sdpa
from simplclip.ops.attention.cuda import CudaAttention
from simplclip.selftest.calls import (
    ATTENTION,
    Call,
    attention_call,
    block_call,
    mlp_call,
    of_lengths,
    similarity_call,
)
from support.kernels.calls import kernels_alone
from support.kernels.cuda_attention import TYPES, code_of_entry
from support.ops import torch_attention
from support.ops.compare import Case

Device = torch.device
UNALIGNED = {"q": "odd_rows", "k": "padded_rows", "v": "strided", "grad out": "odd_rows"}


def checking(call: Call, kind: str, backend: str = "", **of_tensors: str) -> Callable:
    """Returns a function that checks values and gradients on a device. of_tensors: layouts."""

    def check(device: Device) -> None:
        tf32 = kind == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        place = {"device": str(device), "tf32": tf32, "layouts": of_tensors}
        Case(call, TYPES[kind], backend, call.needed(), **place).check(roundings=True)

    return check


def attention_terms(device: Device) -> None:
    call = of_lengths(attention_call(2, 20, 2, 32, causal=True), [20, 7])
    aten = mock.patch.object(sdpa, "aten", torch_attention.aten)
    with aten, kernels_alone(""):
        checking(call, "bf16", "sdpa", v="rows_apart")(device)


def backward_of(device: Device, lengths: list[int]) -> AttentionInto:
    """Returns a call of CUDA C++'s backward, after forward."""
    call = of_lengths(attention_call(len(lengths), 18, 2, 16), lengths)
    tensors = {name: t.to(device) for name, t in call.typed(torch.bfloat16).items()}
    q, k, v, *gains = (tensors[name] for name in ATTENTION)
    forward = AttentionCall(q, k, v, torch.stack(gains), tensors["lengths"].int(), 0.3, False)
    out, lse = CudaAttention.shaped_attention_fwd(forward)
    assert lse.shape == (len(lengths), 2, 18)
    gradients = {f"d{name}": torch.zeros_like(q) for name in "qkv"}
    return AttentionInto(**vars(forward), grad=out, lse=lse, av=out[:0], **gradients)


def no_sequences(device: Device) -> None:
    call = backward_of(device, [])
    d_gains = CudaAttention.shaped_attention_bwd(call)
    assert torch.equal(d_gains, torch.zeros_like(call.gains))


def on_both_devices(device: Device) -> None:
    """Checks that an error of a kernel is one of the op: its lengths are on the other GPU."""
    call = backward_of(device, [18, 7])
    elsewhere = replace(call, lengths=call.lengths.to(f"cuda:{1 - device.index}"))
    with pytest.raises(RuntimeError, match="the launch failed: unspecified launch failure"):
        CudaAttention.shaped_attention_bwd(elsewhere)


def architecture(device: Device) -> None:
    """Checks which GPU's architecture is asked for; starts no kernel."""
    architecture, _ = architecture_and_processors(torch.empty(1, device=device))
    assert architecture == gpus.ARCHITECTURES[device.index], architecture
    assert torch.cuda.current_device() != device.index


CASES = {
    "attention, strided": checking(
        of_lengths(attention_call(3, 20, 2, 32, causal=True), [10, 0, 20]),
        "bf16",
        "cuda",
        **{"q": "rows_apart", "k": "heads_first", "v": "odd_rows", "grad out": "transposed"},
    ),
    "attention, unaligned": checking(attention_call(2, 17, 3, 16), "f16", "cuda", **UNALIGNED),
    "attention, large": checking(
        of_lengths(attention_call(2, 33, 2, 64), [33, 3]),
        "tf32",
        "cuda",
        **{"q": "heads_first", "grad out": "rows_apart"},
    ),
    "attention, none": no_sequences,
    "attention, on both GPUs": on_both_devices,
    "attention, terms": attention_terms,
    "architecture": architecture,
    "block": checking(of_lengths(block_call(2, 20, 32, 2, 48), [20, 7]), "bf16"),
    "mlp": checking(mlp_call(130, 72, 200, 40), "bf16", "triton"),
    "similarity": checking(similarity_call(20, 40, 7, terms=TERMS[:3]), "bf16", "triton"),
    "sigmoid": checking(similarity_call(20, 40, 7, terms=TERMS[3:]), "bf16", "triton"),
}
WITHOUT_KERNELS = {"architecture", "attention, none"}


def with_other_device(function: Callable) -> Callable:
    """Returns a backend's function that is called while the other GPU is the current device.

    Autograd makes the tensors' device the current one before it calls a backward.
    """

    def run(call: Any) -> Any:
        first = next(t for t in vars(call).values() if isinstance(t, Tensor))
        other = 1 - first.device.index
        with torch.cuda.device(other):
            results = function(call)
            assert torch.cuda.current_device() == other, "the current device has changed"
            return results

    return run


@contextlib.contextmanager
def other_device_is_current() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for op, row in backends.TABLE.items():
            for backend in row.values():
                changed = staticmethod(with_other_device(getattr(backend, op)))
                stack.enter_context(mock.patch.object(backend, op, changed))
        stack.enter_context(mock.patch.dict(registry._selected, clear=True))
        yield


def check(name: str, device: Device, both: gpus.Gpus) -> None:
    torch.cuda.set_device(1 - device.index)
    CASES[name](device)
    assert bool(both.started) != (name in WITHOUT_KERNELS), both.started
    expected = device.index, torch.cuda.current_stream(device).cuda_stream
    for started in both.started:
        assert started[1:] == expected, f"{started}, expected device and stream {expected}"


def main(arguments: list[str]) -> None:
    for index in (0, 1):
        torch.cuda.set_stream(torch.cuda.Stream(index))
    with gpus.running(code_of_entry) as both, other_device_is_current():
        for argument in arguments:
            index, _, name = argument.rpartition("/")
            wrong = ""
            try:
                check(name, Device("cuda", int(index or 1)), both)
            except (Exception, pytest.fail.Exception):
                wrong = "".join([*both.failures, traceback.format_exc()])
            both.forget()
            print(json.dumps([argument, wrong]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
