"""RowwiseLoss against the dense form in plain torch."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simplclip.losses import RowwiseLoss
from support.devices import cpu_peak_bytes
from support.losses import D, N, Tempered, batch, call, chunked, dense, distilled, focal
from support.ops.compare import assert_within
from support.programs import run_python

LEAST = 0.05  # about the largest gradient; the bias's gradient is 0 by cancellation


def with_gradients(value, leaves):
    return {
        "value": value.detach(),
        **{str(i): g for i, g in enumerate(torch.autograd.grad(value, leaves))},
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fn", [focal, distilled])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_dense_form(fn, dtype, symmetric):
    leaves, teacher = batch(m=N + 27, dtype=dtype)
    teacher = teacher if fn is distilled else ()
    got = with_gradients(call(chunked(fn, symmetric=symmetric), leaves, teacher), leaves)
    assert [got[str(i)].dtype for i in range(4)] == [t.dtype for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves], [t.double() for t in teacher]
    truth = with_gradients(dense(fn, *wide, symmetric), wide[0])
    plain = with_gradients(dense(fn, leaves, teacher, symmetric), leaves)
    assert_within(got, plain, truth, dtype, f"{fn.__name__} {dtype}", lambda name: LEAST)


def test_fn_gets_float32_logits_under_autocast():
    """The products have autocast's dtype; fn runs without autocast."""

    def fn(logits, positives):
        assert logits.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return focal(logits, positives)

    leaves, _ = batch(n=131, m=140, dtype=torch.float32)
    with torch.autocast("cpu"):
        value = chunked(fn)(*leaves)
    half = [t.detach().bfloat16() if t.dim() else t.detach() for t in leaves]
    expected = with_gradients(chunked(focal)(*(t.requires_grad_() for t in half)), half)
    for name, got in with_gradients(value, leaves).items():
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected[name].float(), rtol=1e-2, atol=1e-3)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            a, b = args
            self.count += a.shape[0] * a.shape[1] * b.shape[1] / (N * N * D)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", ["", "image", "text", "image text scale bias", "scale bias"])
def test_products_of_what_needs_a_gradient(trained):
    leaves, _ = batch()
    expected = torch.autograd.grad(dense(focal, leaves), leaves)
    names = ("image", "text", "scale", "bias")
    for name, t in zip(names, leaves):
        t.requires_grad_(name in trained)
    with Products() as products:
        value = chunked(focal)(*leaves)
        if trained:
            value.backward()
    assert products.count == pytest.approx(
        2 * (1 + (trained != "") + ("image" in trained) + ("text" in trained))
    )
    for name, t, gradient in zip(names, leaves, expected):
        torch.testing.assert_close(t.grad, gradient if name in trained else None)


def test_small_gradients_of_float16_are_not_lost():
    leaves, _ = batch(dtype=torch.float16)

    def small(logits, index):
        return 1e-9 * focal(logits, index)

    # without the bias, whose gradient is 0
    got = torch.autograd.grad(1e9 * chunked(small)(*leaves), leaves[:3])
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for gradient, exact in zip(got, torch.autograd.grad(dense(focal, wide), wide)):
        torch.testing.assert_close(
            gradient.double(), exact, rtol=0, atol=4e-3 * exact.abs().max().item()
        )


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32])
def test_a_teachers_logits_beside_float16_features_are_float32_products(teacher_dtype):
    logits = []

    def fn(z, index, teacher_logits):
        logits.append(teacher_logits)
        return z[:, 0]

    leaves, _ = batch(n=20, dtype=torch.float16)
    _, (x, y, scale) = batch(n=20, dtype=teacher_dtype)
    call(RowwiseLoss(fn, symmetric=False), leaves, (x, y, 100 * scale))
    exact = 100 * scale * (x.double() @ y.double().T)
    torch.testing.assert_close(logits[0].double(), exact, rtol=1e-6, atol=1e-3)


def test_second_derivatives():
    leaves, teacher = batch(n=3, m=4, width=3)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: call(chunked(distilled), leaves, teacher), leaves
    )


def test_parameters_of_fn_are_trained_and_copied():
    leaves, _ = batch(dtype=torch.float32)
    module = Tempered()
    loss = chunked(module)
    (expected,) = torch.autograd.grad(dense(module, leaves), module.temperature)
    loss(*leaves).backward()
    torch.testing.assert_close(loss.fn.temperature.grad, expected)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        other.fn.temperature.data.fill_(0.1)
        torch.testing.assert_close(other(*leaves), dense(other.fn, leaves))


def test_dropout_in_fn_draws_the_same_numbers_in_backward():
    def noisy(logits, index):
        return focal(F.dropout(logits, 0.5), index)

    results = []
    small, _ = batch(n=60, dtype=torch.float32)  # one chunk, so that both draw the same numbers
    for loss in (
        chunked(noisy, symmetric=False),
        lambda *leaves: dense(noisy, leaves, symmetric=False),
    ):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(loss(*small), small))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_a_compiled_fn_and_a_compiled_loss():
    leaves, _ = batch(n=131, m=140, dtype=torch.float32)
    expected = with_gradients(chunked(focal)(*leaves), leaves)
    compiled = torch.compile(focal, dynamic=True, backend="aot_eager")
    for loss in (chunked(compiled), torch.compile(chunked(focal), backend="eager")):
        got = with_gradients(loss(*leaves), leaves)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])


def failing(logits, index):
    raise ZeroDivisionError("in fn")


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z, y: z, ValueError, r"fn: expected a tensor \[R\] = \[128\], got \[128, 150\]"),
        (lambda z, y: z.mean(), ValueError, r"fn: expected a tensor \[R\] = \[128\], got \[\]"),
        (lambda z, y: 1.0, ValueError, r"fn: expected a tensor \[R\] = \[128\], got float"),
        (lambda z, y: y, TypeError, "fn: expected float32, .* got torch.int64"),
        (failing, ZeroDivisionError, "in fn"),
    ],
)
def test_errors_of_fn_and_of_its_result(fn, error, message):
    leaves, _ = batch(dtype=torch.float32)
    with pytest.raises(error, match=message):
        chunked(fn)(*leaves)


@pytest.mark.parametrize("position", range(7))
def test_an_argument_changed_in_place_before_backward_is_an_error(position):
    """The features, the scale, the bias, and the teacher's features and scale."""
    leaves, teacher = batch(dtype=torch.float32)
    arguments = [t.detach().clone() for t in (*leaves, *teacher)]
    leaves = [t.requires_grad_() for t in arguments[:4]]
    value = call(RowwiseLoss(distilled), leaves, arguments[4:])
    with torch.no_grad():
        arguments[position].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


FAILED_BACKWARD = """
import sys, torch
sys.modules["open_clip"] = None  # takes seconds to import
from simplclip.losses import RowwiseLoss

def fail():
    image, text = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16)
    value = RowwiseLoss(lambda logits, index: logits.square().sum(1))(image, text, 9.0)
    text.mul_(2)
    try:
        value.backward()
    except RuntimeError as error:
        print("modified by an inplace operation" in str(error))

fail()
"""


@pytest.mark.slow
def test_a_process_ends_well_after_a_backward_that_raised():
    result = run_python(FAILED_BACKWARD)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


class Learned(RowwiseLoss):
    """A loss whose fn is a method, and whose parameter is not in fn."""

    def __init__(self, **mode):
        super().__init__(self.rows, **mode)
        self.weight = nn.Parameter(torch.tensor(2.0))

    def rows(self, logits, index):
        return self.weight * F.cross_entropy(logits, index, reduction="none")


def test_a_parameter_beside_fn_is_for_one_rank():
    (image, text, scale, _), _ = batch(dtype=torch.float32)
    loss = Learned()
    loss(image, text, scale).backward()
    assert loss.weight.grad > 0
    with pytest.raises(TypeError, match="fn: expected .* got weight of Learned beside it"):
        Learned(world_size=2)._with_learned_parameters()


def test_errors_of_the_arguments():
    (image, text, scale, _), (x, y, s) = batch()
    of_rows = r"dist_image_features: .* 150 rows of image_features, got shape \[149, 16\]"
    for args, teacher, message in (
        ((image[0], text), (), r"image_features: expected a tensor \[N, D\], got shape \[16\]"),
        ((image, text[:, :8]), (), "text_features: .* width of image_features, 16, got 8"),
        ((image, text[:9]), (), r"text_features: .* 150 rows, a positive .*, got \[9, 16\]"),
        ((image, text), (x, y), "dist_logit_scale: .* since a teacher has features and a scale"),
        ((image, text), (x[1:], y, s), of_rows),
        ((image, text), (x, y, s.expand(150)), r"dist_logit_scale: .* got shape \[150\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(chunked(distilled), (*args, scale), teacher)
    for numbers, message in (
        ((scale.expand(150),), r"logit_scale: expected .*one element, got shape \[150\]"),
        (("1",), "logit_scale: expected .*one element, got str"),
        ((None,), "logit_scale: expected .*one element, got NoneType"),
        ((scale, torch.ones(2)), r"logit_bias: expected one element, got shape \[2\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            chunked(focal)(image, text, *numbers)
    with pytest.raises(TypeError, match="fn: expected a function or an nn.Module, got int"):
        RowwiseLoss(3)


def test_a_teacher_is_constant():
    """A scale that the student shares with its teacher is not trained by the teacher's logits."""
    leaves, (x, y, _) = batch()
    scale = leaves[2]
    with pytest.warns(
        UserWarning, match="dist_logit_scale requires a gradient, but is a constant here"
    ):
        (shared,) = torch.autograd.grad(call(chunked(distilled), leaves, (x, y, scale)), scale)
    (apart,) = torch.autograd.grad(call(chunked(distilled), leaves, (x, y, scale.detach())), scale)
    torch.testing.assert_close(shared, apart, rtol=0, atol=0)


def test_arguments_without_a_meaning_are_not_listed():
    arguments = inspect.signature(RowwiseLoss).parameters.keys()
    assert not {"pm_weight", "embed_dim"} & arguments
    assert {"fn", "symmetric", "local_loss", "world_size"} <= arguments
    assert not hasattr(RowwiseLoss, "terms")


def test_output_dict_and_numbers():
    leaves, _ = batch()
    loss = chunked(focal)
    torch.testing.assert_close(
        loss(*leaves[:2], *(t.item() for t in leaves[2:]), output_dict=True),
        {"rowwise_loss": loss(*leaves)},
    )
    assert repr(RowwiseLoss(nn.Identity(), symmetric=False)).startswith(
        "RowwiseLoss(\n  symmetric=False"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_loss_is_float32_whatever_fn_returns(dtype):
    (image, text, scale, bias), _ = batch(dtype=torch.float32)
    value = RowwiseLoss(lambda logits, index: focal(logits, index).to(dtype))(image, text, scale)
    assert value.dtype == torch.float32
    expected = RowwiseLoss(focal)(image, text, scale)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


OF_A_NEW_PROCESS = """
import sys, psutil, torch
sys.modules["open_clip"] = None  # takes seconds to import
from simplclip.losses import RowwiseLoss

def fn(logits, index):
    return torch.nn.functional.cross_entropy(logits, index, reduction="none")

def grown(n):
    leaves = [torch.randn(n, 8, requires_grad=True) for _ in range(2)]
    before = psutil.Process().memory_info().rss
    value = loss(*leaves, torch.tensor(2.0))
    return psutil.Process().memory_info().rss - before

loss = RowwiseLoss(fn)
grown(64)
loss.scratch_bytes = 4096 * 4 * 128
print(grown(4096) // loss.scratch_bytes)
"""


@pytest.mark.slow
def test_the_memory_of_a_chunk_serves_the_next_one():
    """The process grows by few chunks, of 2 MiB, where one matrix has 64 MiB."""
    result = run_python(OF_A_NEW_PROCESS)
    assert not result.returncode, result.stderr
    assert int(result.stdout) < 12


def test_memory_is_that_of_gradients_and_of_some_matrices_of_a_chunk():
    n = 2048
    leaves, _ = batch(n, n, dtype=torch.float32)
    loss = RowwiseLoss(focal)
    loss.scratch_bytes = chunk = 256 * n * 4
    gradients = 2 * n * D * 4
    assert cpu_peak_bytes(lambda: loss(*leaves).backward()) < 8 * chunk + 4 * gradients
