"""Every op and loss traces as one graph under torch.compile: dtypes and autocast, static and
dynamic shapes.
"""

import itertools

import pytest
import torch

import simplclip
from support.ops.small_calls import MODULES, SMALL, module_call

pytestmark = pytest.mark.long


FORMS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def value_and_grads(function, tensors, autocast):
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = function(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


# The form, the calls, and the call for torch's own compiler in the suite; `make prove` takes all.
SUITE = "float32", True
CALLS = {f"similarity_loss {terms}" for terms in ("sigmoid",)}
# the last two contain the other ops
CALLS |= {"shaped_attention lengths", "parallel_mlp", "simplified_block recompute", "WIKDLoss"}
OF_INDUCTOR = "parallel_mlp"  # compiles the least C++
AROUND_SDPA = {("autocast bfloat16", "simplified_block"), ("float32", "shaped_attention lengths")}


def mark(quick):
    return pytest.mark.slow if quick else pytest.mark.prove


def check(name, form, sizes, **options):
    """Checks that a second size, or a second call of a static one, reuses the first one's graph."""
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


EVERY = [
    pytest.param(name, form, dynamic, marks=mark(name in CALLS and (form, dynamic) == SUITE))
    for name, form, dynamic in itertools.product((*SMALL, *MODULES), FORMS, (False, True))
]
OF_TOKENS = [name for name in SMALL if name.startswith(("shaped_attention", "simplified_block"))]
SDPA = [
    pytest.param(form, name, marks=mark((form, name) in AROUND_SDPA))
    for form, name in itertools.product(("float32", "autocast bfloat16"), OF_TOKENS)
]


@pytest.mark.parametrize(("name", "form", "dynamic"), EVERY)
def test_traces_without_graph_breaks(name, form, dynamic):
    check(name, form, (6, 11) if dynamic else (6, 6), dynamic=dynamic, backend="aot_eager")


@pytest.mark.parametrize(("form", "name"), SDPA)
def test_blocks_around_sdpa_trace_without_graph_breaks(form, name):
    """A fake function promises the results that a backend keeps for its backward."""
    with simplclip.backend("sdpa"):
        check(name, form, (6, 11), dynamic=True, backend="aot_eager")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=mark(name == OF_INDUCTOR)) for name in (*SMALL, *MODULES)]
)
def test_compiles(name):
    """torch's own compiler compiles each op and loss; ops on tokens under autocast."""
    of_tokens = name.startswith(("shaped_attention", "parallel_mlp", "simplified_block"))
    check(name, "autocast bfloat16" if of_tokens else "float32", (6, 6), dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_a_block_traced_by_torch_jit_computes_batches_of_other_sizes(trained):
    """A frozen block computes its MLP in chunks, of another number than the example's."""
    block = simplclip.nn.SimplifiedBlock(64, 2).requires_grad_(trained)
    torch.nn.init.ones_(block.mlp_gain)
    traced = torch.jit.trace(block, (torch.randn(300, 77, 64),), check_trace=not trained)
    x = torch.randn(900, 77, 64)
    torch.testing.assert_close(traced(x), block(x))
