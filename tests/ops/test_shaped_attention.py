"""shaped_attention against its definition, on every backend that runs here. Kernels of a GPU have files of their own."""

import itertools

import plain
import pytest
import torch
from calls import attention_inputs as inputs
from calls import check_padding
from devices import BACKENDS, DTYPES, needs_cpu_kernels

from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import shaped_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2], [0, 1]])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_are_those_of_the_definition(causal, lengths, scale):
    args = inputs()
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"scale": scale, "causal": causal, "lengths": lengths}
    expected = plain.attention_by_loops(*args, **options)
    for form in (shaped_attention, plain.shaped_attention):
        out = form(*args, **options)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_zero_queries_and_equal_gains_give_the_identity():
    q, k, v, *_ = inputs()
    for dtype, causal in itertools.product((torch.float64, *DTYPES), (False, True)):
        one = torch.ones(3)
        out = shaped_attention(torch.zeros_like(q, dtype=dtype), k.to(dtype), v.to(dtype), one, one, one, causal=causal)
        # The weights beta A − gamma C cancel before they are rounded: what stays is v itself, in half dtypes too.
        torch.testing.assert_close(out, v.to(dtype), rtol=1e-6, atol=1e-6)


@needs_cpu_kernels
@pytest.mark.parametrize(("length", "k"), [(77, 64), (300, 20)])
def test_memory_is_inputs_results_and_the_log_sum_exps(length, k):
    tensors = [t.float().requires_grad_() for t in inputs(4, length, 2, k)]
    grad = torch.ones(4, length, 2, k)
    shaped_attention(*tensors).backward(grad)
    for t in tensors:
        t.grad = None
    peak = cpu_peak_bytes(lambda: shaped_attention(*tensors).backward(grad))
    results = 4 * grad.nbytes  # out and three gradients; the scratch of a thread's head is not torch's
    assert peak <= results + 4 * 4 * 2 * length + 4096  # the log-sum-exps
    assert peak >= results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_padded_tokens_are_neither_read_nor_written(backend, dtype, causal):
    check_padding(dtype, backend, causal)
