"""Every op and loss traces whole under torch.compile: dtypes and autocast, static and dynamic shapes."""

import contextlib

import pytest
import torch
from calls import MODULES, SMALL, module_call

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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*SMALL, *MODULES])
def test_traces_without_graph_breaks(name, form, dynamic):
    """A second size of a dynamic call, and any second call of a static one, finds the first one's graph."""
    dtype, autocast = FORMS[form]
    torch.manual_seed(0)
    tensors, function = SMALL[name] if name in SMALL else module_call(name, dtype)[:2]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 11) if dynamic else (6, 6):
            args = tensors(n, dtype)
            tolerance = TOLERANCE[autocast or dtype]
            expected = value_and_grads(function, args, autocast)
            # "shift" draws nothing here, so that both calls compute the same.
            for got, want in zip(value_and_grads(compiled, args, autocast), expected, strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
