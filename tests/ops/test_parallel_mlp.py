"""parallel_mlp against two F.linear with an activation between them."""

import plain
import pytest
import torch
from calls import MLP as NAMES
from calls import OPCHECKS
from calls import mlp_inputs as inputs
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from tolerance import assert_within

import simplclip
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import parallel_mlp


def values_and_grads(function, tensors, grad, device="cpu", **options):
    leaves = [None if t is None else t.detach().clone().to(device).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    out.backward(grad.to(out))
    grads = {f"d_{name}": leaf.grad.cpu() for name, leaf in zip(NAMES, leaves) if leaf is not None}
    return {"out": out.detach().cpu(), **grads}


def check(tensors, dtype, backend, act, device="cpu"):
    low = [None if t is None else t.to(dtype) for t in tensors]
    wide = [None if t is None else t.double() for t in low]
    grad = torch.randn(tensors[0].shape[0], tensors[3].shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    with simplclip.backend(backend):
        kernel = values_and_grads(parallel_mlp, low, grad, device, act=act)
    truth = values_and_grads(plain.parallel_mlp, wide, grad.double(), act=act)
    naive = values_and_grads(plain.parallel_mlp, low, grad, act=act)
    assert_within(kernel, naive, truth, dtype, f"{backend} {dtype} {act}")


def check_everything(backend, dtypes=DTYPES, device="cpu"):
    for dtype in dtypes:
        for act in plain.ACTIVATIONS:
            check(inputs(1, 3, 5, 2), dtype, backend, act, device)
            check(inputs(130, 24, 1000, 17), dtype, backend, act, device)
        check(inputs(77, 16, 33, 40, bias=False), dtype, backend, "gelu", device)


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_tolerance(dtype, backend):
    check_everything(backend, [dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_tolerance_on_a_gpu(dtype, backend):
    check_everything(backend, [dtype], "cuda")


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks(dtype):
    """More hidden rows than 8 MiB hold: the weight's gradient is a sum over chunks, the last one not whole."""
    check(inputs(1300, 8, 4096, 8), dtype, "cpu", "gelu")


@needs_cpu_kernels
def test_activations_far_from_zero():
    """Nothing overflows, and a tail of the normal distribution is small and not noise."""
    h = torch.tensor([-1e4, -90.0, -20.0, -6.0, -3.0, -1e-30, 0.0, 1e-30, 3.0, 6.0, 20.0, 90.0, 1e4])[:, None]
    one = torch.ones(1, 1)
    for act, form in plain.ACTIVATIONS.items():
        ours, theirs = (
            values_and_grads(f, [h, one, None, one, None], one.expand(13, 1), act=act)
            for f in (parallel_mlp, plain.parallel_mlp)
        )
        torch.testing.assert_close(ours["out"], form(h), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours["d_x"], theirs["d_x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", list(plain.ACTIVATIONS))
def test_gradients(act):
    tensors = [t.requires_grad_() for t in inputs()]
    assert torch.autograd.gradcheck(lambda *a: parallel_mlp(*a, act=act), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    """h is written over once only: a graph that is retained keeps it."""
    tensors = [t.float().requires_grad_() for t in inputs()]
    with simplclip.backend(backend):
        out = parallel_mlp(*tensors).sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    second = torch.autograd.grad(out, tensors)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [["x"], ["fc1_weight"], ["fc2_bias"], ["fc2_weight", "fc1_bias"]])
def test_only_what_requires_a_gradient_gets_one(backend, trained):
    tensors = dict(zip(NAMES, (t.float() for t in inputs())))
    expected = values_and_grads(plain.parallel_mlp, tensors.values(), torch.ones(7, 5), act="silu")
    for name in trained:
        tensors[name].requires_grad_()
    with simplclip.backend(backend):
        parallel_mlp(**tensors, act="silu").sum().backward()
    for name, t in tensors.items():
        if name in trained:
            torch.testing.assert_close(t.grad, expected[f"d_{name}"])
        else:
            assert t.grad is None


@needs_cpu_kernels
def test_memory():
    """Kept: one hidden layer, written over in backward. Without gradients none, but for some rows."""
    t, c, f = 6000, 64, 2048
    tensors = [x.float() for x in inputs(t, c, f, c)]
    hidden, results = 4 * t * f, 4 * (2 * t * c + 2 * c * f + f + c)
    grad = torch.ones(t, c)
    leaves = [x.requires_grad_() for x in tensors]
    parallel_mlp(*leaves).backward(grad)
    for leaf in leaves:
        leaf.grad = None
    peak = cpu_peak_bytes(lambda: parallel_mlp(*leaves).backward(grad))
    assert hidden <= peak <= hidden + results + (8 << 20) + 4096
    with torch.no_grad():
        assert cpu_peak_bytes(lambda: parallel_mlp(*leaves)) < hidden


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    args = [t.float().requires_grad_() for t in inputs()]
    torch.library.opcheck(torch.ops.simplclip.parallel_mlp_fwd, (*args, "gelu", True, backend), test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(7, 5)}, ValueError, r"x: expected the width of fc1_weight, 6, .* got shape \[7, 5\]"),
        ({"x": torch.zeros(0, 6)}, ValueError, "x: expected .* without an empty dimension"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(7, 6).int()}, TypeError, "x: expected float32.* got torch.int32"),
        ({"fc1_weight": torch.zeros(6)}, ValueError, r"fc1_weight: expected \[F, C\]"),
        ({"fc1_bias": torch.zeros(9)}, ValueError, r"fc1_bias: expected \[10\], got shape \[9\]"),
        ({"fc2_weight": torch.zeros(5, 9)}, ValueError, "fc2_weight: .* F = 10 of fc1_weight"),
        (
            {"fc2_weight": torch.zeros(5, 10).half()},
            TypeError,
            "fc2_weight: expected the dtype of x, .*float32, got .*float16",
        ),
        ({"fc2_bias": torch.zeros(5, device="meta")}, ValueError, "fc2_bias: expected the device of x, cpu, got meta"),
        ({"act": "swish"}, ValueError, "act: expected one of 'gelu', .* got 'swish'"),
    ],
)
def test_errors_name_argument_expectation_and_what_came(change, error, words):
    arguments = dict(zip(NAMES, (t.float() for t in inputs()))) | change
    with pytest.raises(error, match=words):
        parallel_mlp(**arguments)
