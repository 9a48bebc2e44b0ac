"""Shaped attention and the simplified block against their formulas, SDPA and open_clip's block,
plain and compiled.

    pytest benchmarks/test_blocks.py --repeats 9 --write

Time, and for the block the memory that it keeps for backward. The block is one of CLIP's text
tower: C = 512, 8 heads, 77 tokens, causal, 64 sequences. "SDPA alone" computes one of shaped
attention's three terms.
"""

import pytest

from benchmarks import attention_forms, block_forms


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_simplified_block(measured, dtype, backward):
    measured(block_forms.measure, dtype, backward, block_forms.BATCH, "cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", attention_forms.SHAPES, ids=str)
def test_shaped_attention(measured, shape, dtype, backward):
    measured(attention_forms.measure, shape, dtype, backward, "cpu")
