"""parallel_mlp's activations at NaN and far from zero."""

import pytest
import torch

import simplclip
from simplclip.ops import parallel_mlp
from support.devices import BACKENDS, needs_cpu_kernels
from support.ops import plain


@pytest.mark.instruction_set
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", plain.ACTIVATIONS)
def test_nan_in_the_hidden_layer_reaches_what_it_reaches_in_torch(act, backend):
    h = torch.tensor([torch.nan, 1.0, -1.0])[:, None]
    one = torch.ones(1, 1)
    grad = torch.ones(3, 1)
    with simplclip.backend(backend):
        got = torch.autograd.functional.vjp(
            lambda x, w: parallel_mlp(x, one, None, w, None, act=act), (h, one), grad
        )
    expected = torch.autograd.functional.vjp(
        lambda x, w: plain.ACTIVATIONS[act](x) @ w, (h, one), grad
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_cpu_kernels
@pytest.mark.parametrize("act", plain.ACTIVATIONS)
def test_activations_far_from_zero(act):
    """Nothing overflows, and a tail of the normal distribution is small and free of noise."""
    h = torch.tensor(
        [-1e4, -90.0, -20.0, -6.0, -3.0, -1e-30, 0.0, 1e-30, 3.0, 6.0, 20.0, 90.0, 1e4]
    )[:, None]
    one = torch.ones(1, 1)
    got, expected = (
        torch.autograd.functional.vjp(f, h, one.expand_as(h))
        for f in (lambda x: parallel_mlp(x, one, None, one, None, act=act), plain.ACTIVATIONS[act])
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
