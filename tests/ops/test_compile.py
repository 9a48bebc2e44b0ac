"""Every op and loss traces as one graph under torch.compile: dtypes and autocast, static and dynamic shapes."""

import contextlib

import pytest
import torch
from small_calls import MODULES, SMALL, module_call

import simplclip

FORMS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def value_and_grads(function, tensors, autocast):
    context = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
    with context:
        value = function(*tensors)
    return [value.detach(), *torch.autograd.grad(value, [t for t in tensors if t.requires_grad], allow_unused=True)]


# The static or dynamic forms in the suite, and the ops in the suite for torch's own compiler; `make prove` takes all.
SAMPLE = {("float32", True)}
INDUCTOR = ("simplified_block",)
KINDS = [(form, dynamic) for form in FORMS for dynamic in (False, True)]
KINDS = [pytest.param(*kind, marks=pytest.mark.slow if kind in SAMPLE else pytest.mark.prove) for kind in KINDS]


def check(name, form, sizes, **options):
    """Checks that a second size of a dynamic call, and a second call of a static one, reuse the first one's graph."""
    dtype, autocast = FORMS[form]
    torch.manual_seed(0)
    tensors, function = SMALL[name] if name in SMALL else module_call(name, dtype)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in sizes:
            args = tensors(n, dtype)
            tolerance = TOLERANCE[autocast or dtype]
            expected = value_and_grads(function, args, autocast)
            for got, want in zip(value_and_grads(compiled, args, autocast), expected, strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# Options of a sweep that "similarity_loss" traces already.
RARE = ("similarity_loss kl", "similarity_loss positives")
NAMES = [pytest.param(name, marks=pytest.mark.prove if name in RARE else []) for name in (*SMALL, *MODULES)]


@pytest.mark.parametrize(("form", "dynamic"), KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_traces_without_graph_breaks(name, form, dynamic):
    check(name, form, (6, 11) if dynamic else (6, 6), dynamic=dynamic, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "autocast bfloat16"])
@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith(("shaped_attention", "simplified_block"))])
def test_what_sdpa_keeps_traces(name, form):
    """A fake function promises the results that a backend keeps for its backward."""
    with simplclip.backend("sdpa"):
        check(name, form, (6, 11), dynamic=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in INDUCTOR else pytest.mark.prove) for name in (*SMALL, *MODULES)]
)
def test_compiles(name):
    """torch's own compiler compiles each op and loss; ops on tokens under autocast."""
    of_tokens = name.startswith(("shaped_attention", "parallel_mlp", "simplified_block"))
    check(name, "autocast bfloat16" if of_tokens else "float32", (6, 6), dynamic=False)
