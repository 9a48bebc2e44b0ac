"""A simplified block against open_clip's block and its own formula, plain and compiled: time, and memory kept for backward.

    pytest benchmarks/test_simplified_block.py --repeats 9 --write

A block of CLIP's text tower (C=512, 8 heads, 77 tokens, causal), 64 sequences. Forms take turns within a round.
"""

import pytest

from benchmarks.block_forms import measure


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_simplified_block(benchmark, rows, request, dtype, backward):
    args = (dtype, backward, request.config.getoption("--repeats"))
    rows += benchmark.pedantic(measure, args=args, rounds=1)
