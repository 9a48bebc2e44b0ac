"""RowwiseLoss against the dense form in plain torch."""

import copy
import functools
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from paths import PYTHONPATH, SUPPORT
from rank_rowwise import FUNCTIONS, D, N, Tempered, batch, chunked, dense, distilled, focal, ours
from tolerance import assert_within
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import simplclip
from simplclip.losses import rowwise
from simplclip.losses.rowwise import RowwiseLoss
from simplclip.memory.measure import cpu_peak_bytes

pytestmark = pytest.mark.slow  # compilers, dense forms and ranks take a minute and a half

LEAST = 0.05  # about the largest gradient; the bias's gradient is 0 by cancellation
SCRIPT = str(SUPPORT / "rank_rowwise.py")


def with_gradients(value, leaves):
    return {"value": value.detach(), **{str(i): g for i, g in enumerate(torch.autograd.grad(value, leaves))}}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_dense_form(fn, dtype, symmetric):
    leaves, teacher = batch(m=N + 27, dtype=dtype)
    teacher = teacher if fn is distilled else ()
    loss = chunked(fn, symmetric=symmetric)
    got = with_gradients(ours(loss, leaves, teacher), leaves)
    assert [got[str(i)].dtype for i in range(4)] == [t.dtype for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves], [t.double() for t in teacher]
    truth = with_gradients(dense(fn, *wide, symmetric), wide[0])
    if dtype == torch.float64:
        for name, exact in truth.items():
            torch.testing.assert_close(got[name], exact, rtol=0, atol=1e-12 * max(exact.abs().max().item(), LEAST))
    else:
        plain = with_gradients(dense(fn, leaves, teacher, symmetric), leaves)
        assert_within(got, plain, truth, dtype, f"{fn.__name__} {dtype}", LEAST)


def test_chunks_have_even_sizes_and_the_rows_positives():
    sizes, columns = [], []

    def fn(logits, positives):
        sizes.append(tuple(logits.shape))
        columns.append(positives)
        assert logits.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return focal(logits, positives)

    leaves, _ = batch(n=131, m=140, dtype=torch.float32)
    with torch.autocast("cpu"):
        value = chunked(fn)(*leaves)
    assert sizes == [(43, 140), (44, 140), (44, 140), (43, 131), (44, 131), (44, 131)]
    assert torch.equal(torch.cat(columns), torch.arange(131).repeat(2))
    got = with_gradients(value, leaves)
    assert {got[name].dtype for name in got} == {torch.float32}
    half = [t.detach().bfloat16() if t.dim() else t.detach() for t in leaves]
    expected = with_gradients(chunked(focal)(*(t.requires_grad_() for t in half)), half)
    for name in got:
        torch.testing.assert_close(got[name], expected[name].float(), rtol=0, atol=0)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1] / (N * N * D)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("subset", list(itertools.product((False, True), repeat=4)))
def test_gradients_of_any_subset_and_their_products(subset):
    leaves, _ = batch()
    expected = torch.autograd.grad(dense(focal, leaves), leaves)
    some = [t.detach().requires_grad_(need) for t, need in zip(leaves, subset)]
    with Products() as products:
        value = chunked(focal)(*some)
        assert value.requires_grad == any(subset)
        if any(subset):
            value.backward()
    assert products.count == pytest.approx(2 * (1 + subset[0] + subset[1]))
    for t, need, gradient in zip(some, subset, expected):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, gradient)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd_a_direction_has_one_product_and_one_of_a_teacher(context):
    leaves, teacher = batch()
    with context(), Products() as products:
        value = ours(chunked(distilled, symmetric=False), leaves, teacher)
    assert products.count == pytest.approx(2)
    assert not value.requires_grad
    torch.testing.assert_close(value, dense(distilled, leaves, teacher, symmetric=False).detach())


def test_scaled_accumulated_and_repeated_backwards():
    leaves, _ = batch(dtype=torch.float16)
    value = chunked(focal)(*leaves)
    once = torch.autograd.grad(65536 * value, leaves, retain_graph=True)
    again = torch.autograd.grad(65536 * value, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for got, exact in zip(once[:3], torch.autograd.grad(65536 * dense(focal, wide), wide)):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-3 * exact.abs().max().item())

    leaves, _ = batch(dtype=torch.float32)
    value = chunked(focal)(*leaves)
    whole = torch.autograd.grad(value, leaves, retain_graph=True)
    for _ in range(2):
        (0.5 * value).backward(retain_graph=True)
    assert all(torch.equal(t.grad, gradient) for t, gradient in zip(leaves, whole))


def test_float16_products_do_not_flush_small_gradients(monkeypatch):
    """float16 features are multiplied in float16, as on a GPU; a CPU would compute in float32."""
    monkeypatch.setattr(rowwise, "computes_in", lambda dtype, device: dtype)
    leaves, _ = batch(dtype=torch.float16)
    small = lambda logits, positives: 1e-9 * focal(logits, positives)  # noqa: E731
    got = torch.autograd.grad(1e9 * chunked(small)(*leaves), leaves[:3])  # without the bias, whose gradient is 0
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for gradient, exact in zip(got, torch.autograd.grad(dense(focal, wide), wide)):
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=4e-3 * exact.abs().max().item())


def test_a_double_backward_is_an_error_except_of_the_definition():
    leaves, teacher = batch(n=5, m=7)
    first = torch.autograd.grad(chunked(focal)(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="RowwiseLoss: expected a first derivative in reverse mode, got a double backward"):
        first[0].sum().backward()
    with simplclip.backend("reference"):
        assert torch.autograd.gradcheck(lambda *leaves: ours(chunked(distilled), leaves, teacher), leaves)
        assert torch.autograd.gradgradcheck(chunked(focal), leaves)
        torch.testing.assert_close(ours(chunked(distilled), leaves, teacher), dense(distilled, leaves, teacher))
    assert torch.autograd.gradcheck(lambda *leaves: ours(chunked(distilled), leaves, teacher), leaves)


def test_parameters_of_fn_are_trained():
    leaves, _ = batch(dtype=torch.float32)
    module = Tempered()
    gamma = nn.Parameter(torch.tensor(1.5))

    def with_gamma(logits, positives):
        cross_entropy = F.cross_entropy(logits, positives, reduction="none")
        return (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy

    for fn, loss, parameter in (
        (module, chunked(module), module.temperature),
        (with_gamma, chunked(with_gamma, parameters=[gamma]), gamma),
    ):
        assert any(parameter is p for p in loss.parameters())
        (expected,) = torch.autograd.grad(dense(fn, leaves), parameter)
        loss(*leaves).backward()
        torch.testing.assert_close(parameter.grad, expected)
        constant = [t.detach() for t in leaves]
        torch.testing.assert_close(torch.autograd.grad(loss(*constant), parameter)[0], expected)
        loss.requires_grad_(False)
        assert not loss(*constant).requires_grad
        loss.requires_grad_(True)
    assert not module.unused.grad.any()
    with pytest.raises(ValueError, match=r"parameters: expected all that fn reads, got none for a parameter \[\]"):
        chunked(with_gamma)(*leaves)
    with pytest.raises(TypeError, match="parameters: expected nn.Parameters, got Tensor"):
        RowwiseLoss(focal, parameters=[torch.ones(())])


def test_a_copy_has_parameters_of_its_own():
    leaves, _ = batch(dtype=torch.float32)
    loss = chunked(Tempered())
    loss(*leaves)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        other.fn.temperature.data.fill_(0.1)
        torch.testing.assert_close(other(*leaves), dense(other.fn, leaves))
        other(*leaves).backward()
        assert other.fn.temperature.grad is not None
    assert loss.fn.temperature.grad is None
    assert "symmetric=True, compile=False" in repr(loss)


def test_fn_is_compiled_once_for_all_sizes_of_a_chunk(monkeypatch):
    """A counting backend shows it, also for the ninth loss of a process, which runs the code of the first."""
    torch._dynamo.reset()
    counts = []
    compile = torch.compile

    def counted(*args, **options):
        counts.append(CompileCounter())
        return compile(*args, **options, backend=counts[-1])

    monkeypatch.setattr(torch, "compile", counted)
    for power in range(10):
        loss = chunked(functools.partial(lambda power, logits, positives: focal(logits, positives) ** power, power + 1.0))
        loss = chunked(loss.fn, compile=True)
        for n, m in ((131, 140), (150, 151), (260, 270)):
            leaves, _ = batch(n, m, dtype=torch.float32, width=4)
            loss(*leaves)
    assert [count.frame_count for count in counts] == [1] * 10


@pytest.mark.prove  # torch's compiler is slow at its first call
def test_compiled_equals_eager():
    leaves, _ = batch(n=131, m=140, dtype=torch.float32)
    got, expected = (with_gradients(chunked(focal, compile=compile)(*leaves), leaves) for compile in (True, False))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_under_torch_compile_the_graph_breaks():
    leaves, _ = batch(dtype=torch.float32)
    loss = chunked(focal)
    got = torch.compile(lambda *leaves: 2 * loss(*leaves), backend="aot_eager")(*leaves)
    expected = 2 * loss(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def script(*command, **variables):
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)


def test_without_a_compiler_fn_runs_uncompiled_and_a_warning_says_why(tmp_path):
    run = script(SCRIPT, "without a compiler", CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert run.stdout == "passed\n", f"{run.returncode} {run.stderr[-5000:]}"


def failing(logits, positives):
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda z, y: z, ValueError, r"fn: expected \[R\] = \[50\], got \[50, 150\]"),
        (lambda z, y: z.mean(), ValueError, r"fn: expected \[R\] = \[50\], got \[\]"),
        (lambda z, y: 1.0, TypeError, r"fn: expected a tensor \[R\] = \[50\], got float"),
        (lambda z, y: y, TypeError, "fn: expected float32, .* or float64, got torch.int64"),
        (lambda z, y: z.detach().sum(1), ValueError, "fn: expected a result with a gradient for"),
        (failing, ZeroDivisionError, "mine"),
    ],
)
def test_errors_of_fn_and_of_its_result(fn, error, message):
    leaves, _ = batch(dtype=torch.float32)
    with pytest.raises(error, match=message):
        chunked(fn)(*leaves)
    if "with a gradient" not in message:
        with torch.no_grad(), pytest.raises(error, match=message):
            chunked(fn, compile=fn is failing)(*leaves)


def test_errors_of_the_arguments():
    (image, text, scale, _), teacher = batch()
    loss = chunked(distilled)
    names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
    x, y, s = teacher
    for args, given, message in (
        ((image[0], text, scale), (), r"image_features: expected a tensor \[N, D\], got shape \[16\]"),
        ((image, text[:, :8], scale), (), "text_features: expected the width of image_features, 16, got 8"),
        ((image, text[:9], scale), (), "text_features: expected at least 150 rows, a positive for each image, got 9"),
        ((image, text, scale, "b"), (), "logit_bias: expected a number or a tensor with one element, got str"),
        ((image, text, scale), (x, y), "dist_logit_scale: expected a value, since other arguments of the teacher are given"),
        ((image, text, scale), (x, y[:, :8], s), "dist_text_features: expected the width of dist_image_features, 16, got 8"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(*args, **dict(zip(names, given)))
    with pytest.raises(TypeError, match="fn: expected a function or an nn.Module, got int"):
        RowwiseLoss(3)
    with pytest.raises(RuntimeError, match="world_size: expected a process group of 2 ranks, got no process group"):
        chunked(focal, world_size=2)(image, text, scale)


def test_output_dict_and_numbers():
    (image, text, scale, bias), _ = batch()
    loss = chunked(focal)
    assert torch.equal(loss(image, text, 12.0, -0.5, output_dict=True)["rowwise_loss"], loss(image, text, scale, bias))


def test_memory_is_that_of_gradients_and_of_four_matrices_of_a_chunk():
    n = 2048
    leaves, _ = batch(n, n, dtype=torch.float32)
    loss = RowwiseLoss(focal, compile=False)
    chunk, gradients = 512 * n * 4, 2 * n * D * 4
    assert cpu_peak_bytes(lambda: loss(*leaves).backward()) < 6 * chunk + 2 * gradients  # fn uncompiled makes two more
    assert cpu_peak_bytes(lambda: dense(focal, leaves).backward()) > 3 * 4 * n * n


def test_gradients_of_bfloat16_are_kept_in_it(monkeypatch):
    """Only one of the two gradients at a time is summed in float32."""
    monkeypatch.setattr(rowwise, "_ADDED_ROWS", 64)
    n, width = 2048, 512
    leaves, _ = batch(n, n, dtype=torch.bfloat16, width=width)
    peak = cpu_peak_bytes(lambda: chunked(focal)(*leaves).backward())
    assert peak < 2 * n * width * 4 + 2 * 64 * n * 4
