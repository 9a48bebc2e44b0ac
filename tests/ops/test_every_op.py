"""Properties of every op: its definition at sizes beyond those of random calls, equal bits, torch's
rules of registration.
"""

import itertools

import pytest
import torch

import simplclip
from simplclip import selftest
from simplclip.losses.base import TEACHER
from simplclip.ops import backends
from simplclip.selftest.compare import run
from support.devices import DTYPES, needs_cpu_kernels
from support.ops.calls import LARGE
from support.ops.compare import check, function_of
from support.ops.small_calls import SMALL, check_registration


def one(name, result):
    return torch.ones_like(result)


def kernels_and_others():
    """Yields each large call on the kernels in each dtype, and on others that serve in float32."""
    for name, make in LARGE.items():
        marks = [needs_cpu_kernels]
        if name.startswith("shaped_attention"):
            marks.append(pytest.mark.instruction_set)
        yield from (pytest.param(name, dtype, "cpu", marks=marks) for dtype in DTYPES)
        call = make()
        for backend in sorted({*backends.NAMES} - {"cpu"}):
            row = selftest.Row(call.op, backend, torch.float32)
            if backend == "reference" or row.serves(call, torch.device("cpu")):
                yield name, torch.float32, backend


@pytest.mark.parametrize(("name", "dtype", "backend"), [*kernels_and_others()])
def test_values_and_gradients(name, dtype, backend):
    check(LARGE[name](), dtype, backend, twice=backend == "cpu")


@needs_cpu_kernels
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_each_time(name):
    """For one number of threads, and without BLAS for any: its bits depend on it on some CPUs."""
    threads, call = torch.get_num_threads(), LARGE[name]()
    tensors = call.typed(torch.float32)
    results = []
    try:
        for count in (1, 1, 3, 3):
            torch.set_num_threads(count)
            results.append(run(function_of(call), call, tensors, call.needed(), one))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*(result.values() for result in results)):
        assert all(
            torch.equal(value, again) for value, again in zip((first, *others[1::2]), others[::2])
        )
        if name.startswith(("shaped_attention", "feature")):
            assert all(torch.equal(first, other) for other in others)


OF_TOKENS = [name for name in SMALL if name.startswith(("shaped_attention", "simplified_block"))]
EVERY = [pytest.param(name, "cpu", marks=needs_cpu_kernels) for name in SMALL]
EVERY += [*itertools.product(SMALL, ["reference"]), *itertools.product(OF_TOKENS, ["sdpa"])]


@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_registration_and_a_second_backward(name, backend):
    """Backward writes over saved tensors only once: a retained graph keeps them."""
    check_registration(name, backend)
    make, function = SMALL[name]
    tensors = make(4, torch.float32)
    leaves = [t for t in tensors if t.requires_grad]
    with simplclip.backend(backend):
        out = function(*tensors)
    first, second = (
        torch.autograd.grad(out, leaves, retain_graph=again, allow_unused=True)
        for again in (True, False)
    )
    for a, b in zip(first, second):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    "name", [name for name in SMALL if "loss" in name and "projection" not in name]
)
def test_autocast_casts_the_features_and_returns_float32(name):
    make, function = SMALL[name]
    tensors = make(40, torch.bfloat16)
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]
    expected = function(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(*wide)
        assert function(*(t.double() for t in wide)).dtype == torch.float64
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)
    result.backward()
    expected.backward()
    for cast, narrow in zip(wide, tensors):
        if narrow.grad is not None:
            assert cast.grad.dtype == torch.float32
            torch.testing.assert_close(cast.grad, narrow.grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_cpu_kernels), "reference", "sdpa"]
)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 1), (2, 1, 3)])
def test_results_may_be_changed_in_place(backend, shape):
    """Also those of one head or one token, whose transposed form is the same memory."""
    x, gains = torch.randn(*shape, 4, requires_grad=True), torch.ones(shape[2])
    block = simplclip.nn.SimplifiedBlock(4 * shape[2], shape[2])
    with simplclip.backend(backend):
        for out in (
            simplclip.ops.shaped_attention(x, x, x, gains, gains, gains),
            block(x.flatten(2)),
        ):
            out.relu_().sum().backward()


def test_constants_may_come_from_inference_mode():
    """As a teacher's features usually do; autograd cannot save such tensors."""
    x = torch.randn(6, 8, requires_grad=True)
    y = torch.randn(6, 8)
    scale = torch.tensor(2.0)
    with torch.inference_mode():
        teacher, ids = (torch.randn(6, 4), torch.randn(6, 4), torch.tensor(3.0)), torch.arange(6)
    losses = simplclip.losses
    rowwise = losses.RowwiseLoss(lambda logits, index, of_teacher: (logits * of_teacher).sum(1))
    for loss in (
        sum(losses.WIKDLoss()(x, y, scale, *teacher)),
        losses.ClipLoss()(x, y, scale, ids=ids),
        rowwise(x, y, scale, **dict(zip(TEACHER, teacher))),
        simplclip.ops.feature_loss(x[:, :4], teacher[0]),
    ):
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.any()
