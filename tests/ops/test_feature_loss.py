"""Cases beyond random calls of feature_loss: rows without a direction, and every number of a half dtype."""

import pytest
import torch
from calls import Call
from compare import check, function_of, run
from devices import DTYPES

import simplclip
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import feature_loss

CASES = ["cpu", "reference"]  # any backend but the reference means the op, in chunks; the reference is its definition


def features(n, d):
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    return {"student": teacher + torch.randn(n, d, generator=g, dtype=torch.float64), "teacher": teacher}


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 7), (40, 48), (33, 513)])
def test_zero_rows(n, d, backend):
    """A row of zeros, and a row shorter than eps, are divided by eps, a constant."""
    tensors = features(n, d)
    tensors["student"][0] = 0
    tensors["teacher"][n // 2] = 0
    check(Call("feature_loss", tensors), torch.float32, backend)
    tensors["student"][0] = tensors["teacher"][0] * 1e-14
    check(Call("feature_loss", tensors), torch.float32, backend)


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("mode", [{}, {"normalize": False}, {"distance": "smooth_l1"}])
def test_nan_reaches_the_gradient_of_its_row_alone(mode, which, backend):
    call = Call("feature_loss", features(18, 37), mode)
    call.tensors[which][9, 36] = torch.nan
    with simplclip.backend(backend):
        out = run(function_of(call), call, call.typed(torch.float32), ["student"], lambda name, t: torch.ones_like(t))
    assert out["out"].isnan()
    assert out["d_student"][9, 36].isnan()
    assert out["d_student"][torch.arange(18) != 9].isfinite().all()


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column(dtype, backend):
    """One column is normalised to ±1: distances are 0 and 4, and the gradient is 0 up to rounding."""
    student = torch.tensor([[2.0], [-3.0], [5.0]], dtype=dtype, requires_grad=True)
    with simplclip.backend(backend):
        loss = feature_loss(student, torch.tensor([[1.0], [7.0], [-1.0]], dtype=dtype))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(8 / 3))
    assert student.grad.abs().max() < 1e-5


def test_half_precision_is_read_and_rounded_exactly():
    """Every float16 number is read exactly, and gradients round as in torch: d = (x − 0) · 2 / N · grad."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for scale in (1.0, 0.37, 3.1e-4, 7e-8, 1.9):
        student = numbers.clone().reshape(-1, 64).requires_grad_()
        loss = feature_loss(student, torch.zeros_like(student), normalize=False)
        loss.backward(torch.tensor(scale * len(student) / 2))
        expected = (torch.tensor(scale) * numbers.float()).half()
        torch.testing.assert_close(student.grad.flatten(), expected, rtol=0, atol=0, equal_nan=True)


def test_the_squared_distance_of_unit_vectors():
    """For unit vectors of any width the value is 2 - 2 cos."""
    for d in (4, 400):
        student, teacher = 3 * torch.eye(2, d, dtype=torch.float64), torch.ones(2, d, dtype=torch.float64)
        expected = torch.tensor(2 - 2 / d**0.5, dtype=torch.float64)
        torch.testing.assert_close(feature_loss(student, teacher), expected)
        smooth = feature_loss(student, teacher, distance="smooth_l1", beta=2.0)
        torch.testing.assert_close(smooth, expected / 4)


@pytest.mark.parametrize("n", [1, 300, 10_000])
def test_chunks_have_the_values_of_the_whole(n):
    for mode in {}, {"normalize": False}, {"distance": "smooth_l1", "beta": 0.1}:
        check(Call("feature_loss", features(n, 64), mode), torch.float64, "cpu")


def test_memory():
    """Beside the gradient, two norms a row are kept, and some rows are in float32."""
    n, d = 40_000, 256
    student, teacher = torch.randn(n, d).bfloat16().requires_grad_(), torch.randn(n, d).half()

    def step():
        student.grad = None
        loss = feature_loss(student, teacher)
        assert loss.grad_fn.saved_tensors[2].shape == (n, 2)
        loss.backward()

    step()
    assert cpu_peak_bytes(step) < 2 * n * d + 8 * n + (8 << 20)
