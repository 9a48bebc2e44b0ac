"""simplified_block against the same block of plain torch modules."""

import plain
import pytest
import torch
from calls import OPCHECKS
from calls import block_inputs as inputs
from devices import BACKENDS, DTYPES, needs_cpu_kernels
from tolerance import assert_within

import simplclip
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import simplified_block
from simplclip.ops.block.call import DIFFERENTIABLE

WIDE = ("norm_weight", "norm_bias", "alpha", "beta", "gamma", "attention_gain", "mlp_gain")


def values_and_grads(function, tensors, grad, device="cpu", **options):
    leaves = {name: t.detach().clone().to(device).requires_grad_() for name, t in tensors.items()}
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    out = function(**leaves, **options)
    out.backward(grad.to(out))
    return {"out": out.detach().cpu(), **{f"d_{name}": leaf.grad.cpu() for name, leaf in leaves.items()}}


def check(tensors, dtype, backend, recompute=False, device="cpu", **options):
    low = {name: t.float() if name in WIDE else t.to(dtype) for name, t in tensors.items()}
    grad = torch.randn(low["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with simplclip.backend(backend):
        kernel = values_and_grads(simplified_block, low, grad, device, recompute=recompute, **options)
    truth = values_and_grads(plain.simplified_block, {name: t.double() for name, t in low.items()}, grad.double(), **options)
    naive = values_and_grads(plain.simplified_block, low, grad, **options)
    assert_within(kernel, naive, truth, dtype, f"{backend} {dtype} recompute={recompute} {options}", 1e-3)


def check_everything(backend, dtypes=DTYPES, device="cpu"):
    for dtype in dtypes:
        for recompute in (False, True):
            check(inputs(2, 17, 48, 3, 100), dtype, backend, recompute, device, causal=True)
            check(
                inputs(3, 9, 40, 2, 33, "rmsnorm", seed=1), dtype, backend, recompute, device, norm="rmsnorm", act="quickgelu"
            )
            lengths = torch.tensor([17, 0, 3])
            check(inputs(3, 17, 32, 2, 64, projections=False), dtype, backend, recompute, device, lengths=lengths, eps=1e-3)


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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("projections", [False, True])
def test_gradients(norm, projections, recompute):
    tensors = inputs(2, 3, 4, 2, 5, norm, projections)
    options = {"norm": norm, "causal": True, "recompute": recompute, "lengths": torch.tensor([3, 2])}
    leaves = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda *a: simplified_block(**dict(zip(tensors, a)), **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", [["x"], ["qk_weight"], ["fc1_weight"], ["fc2_bias", "mlp_gain"], ["norm_bias", "alpha"]])
def test_only_what_requires_a_gradient_gets_one(backend, trained, recompute):
    tensors = {name: t.float() for name, t in inputs().items()}
    expected = values_and_grads(plain.simplified_block, tensors, torch.ones(2, 5, 12))
    for name in trained:
        tensors[name].requires_grad_()
    with simplclip.backend(backend):
        simplified_block(**tensors, recompute=recompute).sum().backward()
    for name, t in tensors.items():
        if name in trained:
            torch.testing.assert_close(t.grad, expected[f"d_{name}"], rtol=1e-3, atol=1e-4)
        else:
            assert t.grad is None


def test_frozen_tensors_cost_no_products(monkeypatch):
    """Without need of x's gradient, none of the three products for it is formed; nor a frozen weight's."""
    calls = []
    for name in ("mm", "addmm", "addmm_"):
        owner = torch.Tensor if name == "addmm_" else torch
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: calls.append(1) or original(*a, **k))
    counts = {}
    for trained in ("x", "qk_weight", "fc1_weight", "fc2_bias", "all"):
        tensors = {name: t.requires_grad_(trained in (name, "all")) for name, t in inputs(projections=False).items()}
        out = simplified_block(**tensors)
        calls.clear()
        out.sum().backward()
        counts[trained] = len(calls)
    # x: two products into the gradient of n; each weight: its own; those of parallel_mlp_bwd are the backend's.
    assert counts == {"x": 2, "qk_weight": 1, "fc1_weight": 1, "fc2_bias": 0, "all": 4}


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    tensors = {name: t.float().requires_grad_() for name, t in inputs().items()}
    with simplclip.backend(backend):
        out = simplified_block(**tensors).sum()
    first = torch.autograd.grad(out, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(out, list(tensors.values()))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@needs_cpu_kernels
def test_memory():
    """Saved: x, [q|k] and h, or x alone; without gradients neither [q|k] nor h outlives its use."""
    b, length, c, f = 8, 77, 128, 512
    tensors = {name: t.float().requires_grad_() for name, t in inputs(b, length, c, 2, f, projections=False).items()}
    tokens = 4 * b * length * c
    lse = 4 * b * 2 * length

    def saved(recompute):
        held = {}
        parameters = {t.untyped_storage().data_ptr() for t in tensors.values() if t.dim() < 3}

        def pack(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            simplified_block(**tensors, recompute=recompute)
        return sum(size for at, size in held.items() if at not in parameters and size > 4 * 3 * 2)

    assert saved(False) == 7 * tokens + lse
    assert saved(True) == tokens + lse
    tensors = {name: t.float() for name, t in inputs(100, length, 128, 2, 2048, projections=False).items()}
    hidden = 4 * 100 * length * 2048
    assert cpu_peak_bytes(lambda: simplified_block(**tensors)) < 0.8 * hidden  # 24 MiB of scratch, and five times x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(backend, keep):
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors["gains"] = torch.stack([tensors[name] for name in ("alpha", "beta", "gamma")])
    args = [tensors[name].requires_grad_() for name in DIFFERENTIABLE]
    mode = (torch.tensor([5, 2], dtype=torch.int32), "layernorm", 1e-5, "gelu", 0.5, True, keep, backend)
    utils = OPCHECKS if keep else (*OPCHECKS, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.simplclip.simplified_block_fwd, (*args, *mode), test_utils=utils)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 12)}, ValueError, r"x: expected a tensor \[B, L, C\], got shape \[5, 12\]"),
        ({"x": torch.zeros(2, 0, 12)}, ValueError, "x: expected .* without an empty dimension"),
        (
            {"alpha": torch.ones(5)},
            ValueError,
            r"alpha: expected one value per head, \[H\] with H a divisor of C = 12, got \[5\]",
        ),
        ({"beta": torch.ones(4)}, ValueError, r"beta: expected shape \[3\], got \[4\]"),
        ({"qk_weight": torch.zeros(12, 12)}, ValueError, r"qk_weight: expected shape \[24, 12\], got \[12, 12\]"),
        ({"qk_weight": torch.zeros(24, 12).bfloat16()}, TypeError, "qk_weight: expected the dtype of x"),
        ({"norm": "batchnorm"}, ValueError, "norm: expected one of 'layernorm', 'rmsnorm', got 'batchnorm'"),
        ({"norm": "rmsnorm"}, ValueError, "norm_bias: expected None, since RMSNorm has no bias, got a tensor"),
        ({"norm_weight": torch.ones(12, device="meta")}, ValueError, "norm_weight: expected the device of x, cpu, got meta"),
        ({"mlp_gain": "1"}, TypeError, "mlp_gain: expected a number or a tensor with one element, got str"),
        ({"lengths": torch.tensor([6, 1])}, ValueError, "lengths: expected 0 to 5 valid tokens, got 6"),
        ({"alpha": torch.ones(3, device="meta")}, ValueError, "alpha: expected the device of x, cpu, got meta"),
        *(
            ({name: torch.ones(3 if len(name) < 6 else ()).to(dtype)}, TypeError, f"{name}: expected float32, .* got {dtype}")
            for name in ("alpha", "beta", "gamma", "mlp_gain", "attention_gain")
            for dtype in (torch.complex64, torch.bool, torch.int32, torch.float8_e4m3fn)
        ),
        *(({"eps": eps}, ValueError, f"eps: expected a number above 0, got {eps}") for eps in (0.0, -1e-5)),
    ],
)
def test_errors_name_argument_expectation_and_what_came(change, error, words):
    tensors = {name: t.float() for name, t in inputs().items()} | change
    with pytest.raises(error, match=words):
        simplified_block(**tensors)
