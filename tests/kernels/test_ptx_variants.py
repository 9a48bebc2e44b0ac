"""Kernels as ptxas and the hardware may compute them: fused products, errors of functions."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import fused, noisy
from support.kernels.few_lines import kernel_of, run_kernel

FUSING = """
mul.f32 %r20, %r21, %r22;
{between}
{sum} %r20, {terms};
"""


@pytest.mark.parametrize(
    ("sum_", "terms", "between", "factors"),
    [
        ("add.f32", "%r20, %r23", "", (1, 1)),
        ("add.f32", "%r23, %r20", "mov.b32 %r24, %r20;", (1, 1)),
        ("sub.f32", "%r20, %r23", "", (1, -1)),
        ("sub.f32", "%r23, %r20", "", (-1, 1)),
        ("add.rn.f32", "%r20, %r23", "", None),
        ("add.ftz.f32", "%r20, %r23", "", None),
        ("add.f32", "%r20, %r23", "$L1:", None),
        ("add.f32", "%r20, %r23", "mov.b32 %r21, %r24;", None),
        ("add.f32", "%r20, %r23", "neg.f32 %r20, %r20;", None),
    ],
)
def test_fused_sums(sum_, terms, between, factors):
    """(1 + 2^-12)^2 is 1 + 2^-11 + 2^-24; a product that is rounded by itself loses the last."""
    kernel = kernel_of(FUSING.format(sum=sum_, terms=terms, between=between))
    changed = fused(kernel)
    if factors is None:
        assert changed == kernel
        return
    near = np.full(32, 1 + 2**-12, np.float32)
    batch = run_kernel(changed, r21=near, r22=near, r23=np.ones(32, np.float32))
    sign, other = factors
    expected = np.float32(sign * (1 + 2**-11 + 2**-24) + other)
    assert (batch.registers["32"][20].view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("ex2.approx.ftz.f32 %r20, %r21;", np.exp2),
        ("lg2.approx.f32 %r20, %r21;", np.log2),
        ("rcp.approx.ftz.f32 %r20, %r21;", np.reciprocal),
        ("div.full.f32 %r20, %r21, 0f40400000;", lambda x: x / 3),
    ],
)
def test_noise(operation, function):
    values = np.tile(np.linspace(0.25, 4, 16, dtype=np.float32), 2)
    values[[14, 30]], values[[15, 31]] = 0, np.inf
    kernel = kernel_of(operation)
    got, exact = (
        run_kernel(each, r21=values).registers["32"][20].view(np.float32)
        for each in (noisy(kernel), kernel)
    )
    np.testing.assert_array_equal(got[:16], got[16:])  # equal numbers have equal errors
    finite = np.isfinite(exact)
    without_error = ~finite | (values == 0)
    np.testing.assert_array_equal(got[without_error], exact[without_error])
    size = np.maximum(np.abs(exact), 1) if function is np.log2 else np.abs(exact)
    exact, size = function(values[finite].astype(np.float64)), size[finite]
    error = np.abs(got[finite] - exact)
    assert (error <= 2.0**-21.8 * size).all()
    assert (error > 2.0**-25 * size).any()
