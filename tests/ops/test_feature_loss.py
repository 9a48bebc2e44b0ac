"""Cases beyond random calls of feature_loss: rows without a direction, and every number of a half
dtype.
"""

import numpy as np
import pytest
import torch

import simplclip
from simplclip.ops import feature_loss
from simplclip.selftest.calls import feature_call
from simplclip.selftest.compare import run
from support.ops.compare import check, function_of

# any backend but the reference means the op, in chunks; the reference is its definition
CASES = ["cpu", "reference"]


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize(("n", "d"), [(2, 7), (40, 48), (33, 513)])
def test_features_of_zeros(n, d, backend):
    """A row of zeros, and a row shorter than eps, are divided by eps, a constant."""
    call = feature_call(n, d)
    call.tensors["student"][0] = 0
    call.tensors["teacher"][n // 2] = 0
    check(call, torch.float32, backend)
    call.tensors["student"][0] = call.tensors["teacher"][0] * 1e-14
    check(call, torch.float32, backend)


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("mode", [{}, {"normalize": False}, {"distance": "smooth_l1"}])
def test_nan_reaches_the_gradient_of_its_row_alone(mode, which, backend):
    call = feature_call(18, 37, **mode)
    call.tensors[which][9, 36] = torch.nan
    tensors = call.typed(torch.float32)
    with simplclip.backend(backend):
        out = run(function_of(call), call, tensors, ["student"], lambda _, t: torch.ones_like(t))
    assert out["out"].isnan()
    assert out["d_student"][9, 36].isnan()
    assert out["d_student"][torch.arange(18) != 9].isfinite().all()


def test_a_number_of_numpy_is_a_beta():
    student, teacher = torch.randn(2, 4, 8).unbind()
    expected = feature_loss(student, teacher, distance="smooth_l1", beta=0.25)
    assert feature_loss(student, teacher, distance="smooth_l1", beta=np.float32(0.25)) == expected


def test_half_precision_is_read_and_rounded_exactly():
    """For every float16 number; gradients are (x − 0) · 2 / N · grad."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    numbers = bits.to(torch.int16).view(torch.float16)
    for scale in (1.0, 0.37, 3.1e-4, 7e-8, 1.9):
        student = numbers.clone().reshape(-1, 64).requires_grad_()
        loss = feature_loss(student, torch.zeros_like(student), normalize=False)
        loss.backward(torch.tensor(scale * len(student) / 2))
        expected = (torch.tensor(scale) * numbers.float()).half()
        torch.testing.assert_close(student.grad.flatten(), expected, rtol=0, atol=0, equal_nan=True)
