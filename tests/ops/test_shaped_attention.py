"""shaped_attention against its definition, on every backend that runs here.

Kernels for GPUs have tests of their own.
"""

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import simplclip
from simplclip.ops import backends, shaped_attention
from simplclip.ops.attention import sdpa
from simplclip.selftest.calls import attention_call, block_call, of_lengths
from support.devices import BACKENDS, DTYPES
from support.ops import plain, torch_attention
from support.ops.compare import check, check_padding


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2], [0, 1]])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_are_those_of_the_definition(causal, lengths, scale):
    args = attention_call().tensors.values()
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"scale": scale, "causal": causal, "lengths": lengths}
    expected = plain.attention_by_loops(*args, **options)
    for form in (shaped_attention, plain.shaped_attention):
        out = form(*args, **options)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_have_a_gradient_of_their_values(backend):
    """A logit's rounding error is then far above 1."""
    call = attention_call(length=50, k=32)
    call.tensors["q"] *= 1e8
    q, k, v, *gains = call.typed(torch.float32).values()
    v.requires_grad_()
    with simplclip.backend(backend):
        shaped_attention(q, k, v, *gains).sum().backward()
    values = call.tensors["v"].requires_grad_()
    plain.shaped_attention(*call.tensors.values()).sum().backward()
    torch.testing.assert_close(v.grad.double(), values.grad, rtol=1e-5, atol=1e-5)


def test_zero_queries_and_equal_gains_give_the_identity():
    q, k, v, *_ = attention_call().tensors.values()
    for dtype, causal in itertools.product((torch.float64, *DTYPES), (False, True)):
        one = torch.ones(3)
        out = shaped_attention(
            torch.zeros_like(q, dtype=dtype), k.to(dtype), v.to(dtype), one, one, one, causal=causal
        )
        # The weights beta A − gamma C cancel before they are rounded, so that v itself remains, in
        # half dtypes too.
        torch.testing.assert_close(out, v.to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_padded_tokens_are_neither_read_nor_written(backend, dtype, causal):
    check_padding(dtype, backend, causal)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"])
def test_tensors_are_made_on_the_calls_device(backend):
    tensors = [t.float().requires_grad_() for t in attention_call().tensors.values()]
    lengths = torch.tensor([5, 2])
    expected = shaped_attention(*tensors, lengths=lengths)
    with torch.device("meta"), simplclip.backend(backend):  # as torch.set_default_device does
        out = shaped_attention(*tensors, lengths=lengths)
        out.backward(torch.ones_like(out))
    torch.testing.assert_close(out, expected)


@pytest.fixture(params=["cpu", "flash", "efficient", "xformers"])
def around(request, monkeypatch):
    """Names a backend around another attention; a GPU's are stand-ins that check arguments."""
    if request.param == "cpu":
        return "sdpa"
    monkeypatch.setattr(sdpa, "aten", torch_attention.aten)
    monkeypatch.setattr(sdpa, "kernel", lambda q: "efficient" if q.itemsize != 2 else request.param)
    if request.param != "xformers":
        return "sdpa"
    fmha = SimpleNamespace(
        memory_efficient_attention_forward_requires_grad=torch_attention.xformers_forward,
        memory_efficient_attention_backward=torch_attention.xformers_backward,
    )
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    package = SimpleNamespace(fmha=fmha, LowerTriangularMask=torch_attention.LowerTriangularMask)
    monkeypatch.setitem(sys.modules, "xformers.ops", package)
    row = backends.TABLE["shaped_attention"]["xformers"]
    served = row._replace(why_not=lambda *of_call: None)
    monkeypatch.setitem(backends.TABLE["shaped_attention"], "xformers", served)
    return "xformers"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_shaped_attention_around_attention_of_torch_and_xformers(around, dtype, causal):
    for shape, lengths in (
        ((3, 81, 2, 16), None),
        ((4, 97, 3, 20), (97, 0, 1, 50)),
        ((1, 1, 1, 8), None),
        ((2, 33, 1, 40), (32, 33)),
    ):
        if around == "xformers" and lengths:
            continue
        call = of_lengths(attention_call(*shape, causal=causal), lengths)
        halves = dtype != torch.float32  # beta's gradient comes from rounded A v, and may cancel
        check(call, dtype, around, roundings=halves)
        for layout in ("odd_rows", "heads_first") if shape[1] > 80 else ():
            forms = dict.fromkeys(("q", "k", "v", "grad out"), layout)
            check(call, dtype, around, layouts=forms, roundings=halves)
    for scale in (-2.0, 0.0, 30.0):
        call = attention_call(1, 70, 2, 16, causal=causal, scale=scale)
        check(call, dtype, around, roundings=True)
    if around != "xformers":
        check_padding(dtype, around, causal)


def test_a_block_around_attention_of_torch_and_xformers(around):
    for options in ({}, {"recompute": True}, {"causal": True}):
        check(block_call(2, 83, 32, 2, 40, **options), torch.float32, around)
