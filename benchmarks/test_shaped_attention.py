"""shaped_attention against the formula, SDPA and FlexAttention with the other two terms, plain and compiled.

    pytest benchmarks/test_shaped_attention.py --repeats 9 --write

Forms take turns within a round; the figure is the median of the rounds. Every form's result is compared with the formula's
in float64 before it is timed. "SDPA alone" computes one of the three terms.
"""

import pytest

from benchmarks.attention_forms import SHAPES, measure


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shaped_attention(benchmark, rows, request, shape, dtype, backward):
    args = (shape, dtype, backward, request.config.getoption("--repeats"))
    rows += benchmark.pedantic(measure, args=args, rounds=1)
