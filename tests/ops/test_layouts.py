"""Every tensor argument of every op, and the gradient that comes in, in other memory layouts than a contiguous one."""

import interpreter
import layouts
import pytest
import torch
from calls import ATTENTION, MLP, Call, attention_inputs, block_inputs, function_of, mlp_inputs, run
from devices import BACKENDS, needs_cpu_kernels
from interpreter import needs_triton
from similarity import make_inputs
from tolerance import EPS

import simplclip
from simplclip.ops import parallel_mlp


def _similarity(**options):
    made = {"plane", "teacher_width"}
    leaves, fixed = make_inputs(9, 12, 2, ids=True, width=10, **{k: options[k] for k in ("terms", *(made & options.keys()))})
    tensors = leaves | {name: fixed.pop(name) for name in ("ids", "text_ids")}
    rest = {k: v for k, v in options.items() if k not in made}
    if rest.get("negatives") == "shift":
        tensors["shift"] = torch.tensor(4)
    return Call("similarity_loss", tensors, fixed | rest)


def _attention(**options):
    tensors = dict(zip(ATTENTION, attention_inputs()))
    return Call("shaped_attention", tensors | {"lengths": torch.tensor([5, 3])}, options)


PM = ("pair_matching",)
PROJECTED = {"student": (9, 7), "teacher": (9, 11), "projection": (11, 7)}
CALLS = {
    "contrastive": _similarity(terms=("contrastive",)),
    "pair matching": _similarity(terms=PM),
    "pair matching, hadamard": _similarity(terms=PM, plane="hadamard"),
    "pair matching, hard, hadamard": _similarity(terms=PM, plane="hadamard", negatives="hard"),
    "pair matching, shift": _similarity(terms=PM, negatives="shift"),
    "relational": _similarity(terms=("relational",)),
    "infonce": _similarity(terms=("interactive",), teacher_width=7),
    "kl": _similarity(terms=("interactive",), teacher_width=7, interactive="kl"),
    "all terms": _similarity(terms=("contrastive", *PM, "relational", "interactive"), interactive="kl"),
    "attention": _attention(),
    "attention, causal": _attention(causal=True),
    "mlp": Call("parallel_mlp", dict(zip(MLP, mlp_inputs()))),
    "block": Call("simplified_block", block_inputs() | {"lengths": torch.tensor([5, 3])}, {"causal": True}),
    "block, recompute": Call("simplified_block", block_inputs(), {"recompute": True}),
    "feature": Call("feature_loss", {name: torch.randn(9, 11).double() for name in ("student", "teacher")}),
    "feature, projection": Call("feature_loss", {name: torch.randn(*shape).double() for name, shape in PROJECTED.items()}),
}  # fmt: skip


def _gradient(name, result, layout=None):
    g = torch.Generator().manual_seed(len(name))
    grad = torch.randn(result.shape, generator=g).to(result.dtype)
    return grad if layout is None else layout(grad)


def _assert_equal(found, expected, dtype, what):
    """To rounding: a BLAS takes its own way for each layout."""
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max().item()
        size = max(value.double().abs().max().item(), 1e-3)  # less is 0 by cancellation
        assert error <= EPS[dtype] * size, f"{what}: {name} differs by {error}"


def check(call, dtype, backend):
    tensors, function, need = call.typed(dtype), function_of(call), call.needed()
    with simplclip.backend(backend):
        whole = run(function, call, tensors, need, _gradient)
        for name, t in tensors.items():
            for kind, layout in layouts.ALL.items():
                view = layout(t)
                if view is None:
                    continue
                expected = whole
                if kind in layouts.OTHER:
                    expected = run(function, call, tensors | {name: view.contiguous()}, need, _gradient)
                found = run(function, call, tensors | {name: view}, need, _gradient)
                _assert_equal(found, expected, dtype, f"{name} {kind}")
        for kind, layout in layouts.ALL.items():

            def as_view(name, result, layout=layout):
                view = _gradient(name, result, layout)
                return _gradient(name, result) if view is None else view

            found = run(function, call, tensors, need, as_view)
            expected = run(function, call, tensors, need, lambda *args: as_view(*args).clone().contiguous())  # noqa: B023
            _assert_equal(found, expected, dtype, f"incoming gradient {kind}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_any_layout(name, dtype, backend):
    check(CALLS[name], dtype, backend)


def test_layouts_are_what_they_say():
    t = torch.randn(3, 4)
    for layout in layouts.SAME.values():
        assert torch.equal(layout(t), t)
    assert layouts.strided(t).stride() == (14, 2)
    assert layouts.transposed(t).stride() == (1, 3)
    assert layouts.offset(t).data_ptr() % 16
    assert layouts.negated(t).is_neg()
    assert layouts.imaginary(t).is_neg()
    assert layouts.scalar_expanded(t).stride() == (0, 0)


@needs_cpu_kernels
def test_native_ops_refuse_a_layout_that_they_cannot_read():
    h, weight, bias, out = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8)[::2], torch.empty(3, 4)
    native = torch.ops.simplclip.parallel_mlp_fwd_cpu
    with pytest.raises(RuntimeError, match=r"bias: expected a contiguous tensor, got strides \[2\]"):
        native(h, weight, bias, "gelu", out, False)
    with pytest.raises(RuntimeError, match=r"h: expected a contiguous tensor, got strides \[1, 3\]"):
        native(layouts.transposed(h), weight, None, "gelu", out, False)
    with pytest.raises(RuntimeError, match="bias: expected the dtype of h"):
        native(h, weight, bias.contiguous().bfloat16(), "gelu", out, False)
    native(h, weight, bias.contiguous(), "relu", out, False)
    torch.testing.assert_close(out, torch.relu(h) @ weight.T + bias)
    q = torch.randn(2, 5, 3, 4)
    with pytest.raises(RuntimeError, match=r"k: expected stride 1 in the last dimension, got strides \[1, 2, 10, 30\]"):
        torch.ops.simplclip.shaped_attention_fwd_cpu(q, layouts.transposed(q), q, torch.ones(3, 3), None, 0.5, False)
    lengths = torch.tensor([3], dtype=torch.int32).expand(2)
    with pytest.raises(RuntimeError, match="lengths: expected a contiguous tensor"):
        torch.ops.simplclip.shaped_attention_fwd_cpu(q, q, q, torch.ones(3, 3), lengths, 0.5, False)
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="teacher: expected a contiguous tensor"):
        torch.ops.simplclip.feature_loss_fwd_cpu(x, layouts.strided(x), False, 1.0, True)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_second_bias_of_mlp(dtype):
    """A bias that is a column of a larger parameter: read past its end once."""
    x, fc1, b1, fc2, b2 = (t.to(dtype) for t in mlp_inputs())
    column = layouts.strided(b2)
    with simplclip.backend("cpu"):
        assert torch.equal(parallel_mlp(x, fc1, b1, fc2, column), parallel_mlp(x, fc1, b1, fc2, b2))


@needs_triton
@pytest.mark.slow
def test_triton_under_its_interpreter():
    code = "import torch, test_layouts as t; [t.check(t.CALLS[name], torch.float32, 'triton') for name in ('mlp', 'feature')]"
    done = interpreter.run("-c", code)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.prove
def test_similarity_under_tritons_interpreter():
    code = "import torch, test_layouts as t; t.check(t.CALLS['pair matching, hadamard'], torch.float32, 'triton')"
    done = interpreter.run("-c", code)
    assert done.returncode == 0, done.stderr
