"""shaped_attention on a CUDA device, by CUDA C++ and around SDPA, against float64."""

import itertools

import pytest
import torch

import simplclip
from simplclip.ops import backends, shaped_attention
from simplclip.selftest.calls import attention_call, of_lengths
from simplclip.selftest.compare import run
from support.devices import DTYPES
from support.ops.compare import Case, assert_within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.cuda_extension is None, reason=str(backends.cuda_extension_error)),
]
TOKENS = (1, 15, 17, 50, 64, 77, 80, 81, 197, 257, 288)
WIDTHS = (16, 32, 64, 80, 96, 128)


@pytest.fixture(autouse=True)
def products_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values_and_gradients(tokens, dtype):
    """q, k and v have rows with gaps, as views in a block, or begin at odd addresses."""
    precision = "tf32" if dtype == torch.float32 else dtype
    every_length = (None, [0, tokens, 1, tokens // 2, tokens - 1])
    for width, causal, lengths in itertools.product(WIDTHS, (False, True), every_length):
        call = of_lengths(attention_call(5, tokens, 3, width, causal=causal), lengths)
        served = not backends.cuda_extension.shaped_attention_why_not(
            tokens, width, precision == "tf32"
        )
        apart = dict.fromkeys(
            ("q", "k", "v", "grad out"), "odd_rows" if width == 32 else "rows_apart"
        )
        case = Case(
            call, dtype, "cuda" if served else "sdpa", call.needed(), device="cuda", layouts=apart
        )
        results = case.run()
        for name, value in case.run().items() if served else ():
            assert torch.equal(value, results[name]), f"{name}: a second run gave other values"
        with simplclip.backend("reference"):
            plain = run(shaped_attention, call, case.tensors, case.need, case.incoming)
        # Sums over all tokens may nearly cancel: their error is relative to a sum of terms with
        # random signs.
        gains = dict.fromkeys(("d_alpha", "d_beta", "d_gamma"), (tokens * width) ** 0.5)
        least = (dict.fromkeys(results, 0.01) | gains).__getitem__
        what = f"{tokens} tokens, width {width}, {call.options}, lengths {lengths}"
        assert_within(
            results, plain, case.by_definition(torch.Tensor.double), precision, what, least
        )
