"""Loads and stores of compiled Triton kernels lie within tensors, also with more than 2^31
elements.

A call runs on fake CUDA tensors, which have no memory. Its launches are compiled as for a card, and
run on addresses alone.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.kernels import grids
from support.kernels.calls import skip_without_fence

pytest.importorskip("triton", reason="the package triton is not installed")

from ptx.capture import Driver, driven
from ptx.huge import HugeCard
from ptx.machine import Code
from simplclip.plan.cards import CARDS
from simplclip.selftest.calls import Call, attention_call, mlp_call, similarity_call
from support.kernels.few_lines import kernel_of
from support.kernels.recorder import Launch, Stand, Started, trace
from support.ops import layouts
from support.ops.recorded_calls import forward_and_backward

pytestmark = pytest.mark.long


LARGE = 131_072, 1024  # N, D
MANY = 1_000_003, 2200  # N D above 2^31, and an odd number of rows
TOKENS = 2, 2_000_003, 16, 80  # B, L, H, K: one sequence has more than 2^31 elements
SEQUENCES = 5, 500_003, 16, 80  # and here several, of fewer
CHUNKS = {"scratch_bytes": 6 << 30}


def heads_first(*shape: int, **options) -> Call:
    """Returns a call whose heads, each with many elements, lie before tokens in memory."""
    call = attention_call(*shape, **options)
    for name in "qkv":
        call.tensors[name] = layouts.heads_first(call.tensors[name])
    return call


def loss_call(size: tuple[int, int], *terms: str, **options) -> Call:
    if len(terms) > 1:
        options["weights"] = dict.fromkeys(terms, 1.0)
    n, width = size
    call = similarity_call(n, n, terms=terms, width=width, **options)
    if "sigmoid" in terms:
        call.tensors["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    return call


CASES: dict[str, Callable[[], Call]] = {
    "mlp": partial(mlp_call, 1_000_003, 768, 3072, 768),
    # in the half types G has more than 2^31 elements
    "many": partial(loss_call, MANY, "contrastive", **CHUNKS),
    "many sigmoid": partial(loss_call, MANY, "sigmoid", **CHUNKS),
    "attention": partial(attention_call, *TOKENS),
    "attention, sequences": partial(attention_call, *SEQUENCES),
    "attention, heads first": partial(heads_first, 1, *TOKENS[1:]),
    "attention causal": partial(attention_call, *TOKENS, causal=True),
    "contrastive": partial(loss_call, LARGE, "contrastive"),
    "contrastive+pair_matching": partial(loss_call, LARGE, "contrastive", "pair_matching"),
    "sigmoid": partial(loss_call, LARGE, "sigmoid"),
    "all": partial(loss_call, LARGE, "contrastive", "pair_matching", "relational"),
}
SUITE = ("mlp", "many sigmoid", "attention", "attention, sequences", "attention, heads first")
TURNS = itertools.cycle((("float32", "rtx-3090"), ("float16", "rtx-5090"), ("bfloat16", "h100")))


def sampled(started: list[Started]) -> list[Launch]:
    """Returns the first and the last launch of each kernel and its compiled form."""
    launches_of = defaultdict(list)
    for each in started:
        if each.by == "triton":
            options = each.launch.options
            constants = {name: value for name, value in options.items() if name.isupper()}
            launches_of[each.name, repr(constants)].append(each.launch)
    return [
        launches[i] for launches in launches_of.values() for i in sorted({0, len(launches) - 1})
    ]


def check(name: str, dtype: str, card: str) -> None:
    skip_without_fence(name, dtype, CARDS[card].architecture)
    with FakeTensorMode():
        call = CASES[name]()
        tensors = call.typed(getattr(torch, dtype))
    # fewer chunks of an MLP's rows, each as many bytes as an index of 32 bits can count
    with mock.patch("simplclip.kernels.mlp.launch.SCRATCH_BYTES", 1 << 31):
        started = trace(partial(forward_and_backward, call), tensors, card)
    machine = HugeCard(sm=CARDS[card].architecture, compare=grids.check)
    with driven(Driver(machine)):
        for launch in sampled(started):
            launch.kernel[launch.grid](*launch.args, **launch.options)
    assert machine.launches >= 2
    assert machine.addresses > 1 << 12
    assert not machine.hazards, "\n".join(map(str, machine.hazards.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE)
def test_addresses_at_large_sizes(name):
    check(name, "bfloat16", "rtx-3090")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "dtype", "card"), [(name, *turn) for name, turn in zip(CASES, TURNS)]
)
def test_more_addresses(name, dtype, card):
    check(name, dtype, card)


LOOP = """
ld.param.u64 %d0, [p0];
mov.u32 %r0, %ctaid.x;
mov.b32 %r1, 0;
{row}
$L1:
mul.wide.s32 %d3, %r1, 2;
add.s64 %d4, %d2, %d3;
ld.global.b16 %r3, [%d4];
add.s32 %r1, %r1, 1;
setp.lt.s32 %p1, %r1, {width};
@%p1 bra $L1;
"""
WIDE = "mul.wide.s32 %d1, %r0, 4400;\nadd.s64 %d2, %d0, %d1;"
NARROW = "mul.lo.s32 %r2, %r0, 2200;\nmul.wide.s32 %d1, %r2, 2;\nadd.s64 %d2, %d0, %d1;"


def test_an_index_of_32_bits_and_the_end_of_a_loop():
    """The last row of [N, D] is right; with the row's index in 32 bits, or a column more, wrong."""
    for row, width, hazards in ((WIDE, 2200, 0), (NARROW, 2200, 1), (WIDE, 2201, 1)):
        rows = SimpleNamespace(storage=0, allocated=4400 * MANY[0], data_ptr=lambda: 0)
        machine, code = HugeCard(), Code(kernel_of(LOOP.format(row=row, width=width)))
        machine.launch(code, MANY[0], 32, 0, [rows])
        assert len(machine.hazards) == hazards
        assert machine.addresses < 2000


GRID = """
ld.param.u64 %d0, [p0];
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %tid.x;
{change}
mul.wide.s32 %d1, %r0, 128;
mul.wide.s32 %d2, %r1, 4;
add.s64 %d3, %d0, %d1;
add.s64 %d4, %d3, %d2;
st.global.b32 [%d4], %r1;
"""
BLOCKS = 1 << 20


@pytest.mark.parametrize(
    ("programs", "change", "error"),
    [
        (BLOCKS, "", None),
        (65535, "", "expected 1048576 programs for blocks [32] of [33554432], got 65535"),
        (BLOCKS - 1, "", "expected 1048576 programs"),
        (BLOCKS, "min.s32 %r0, %r0, 1000;", "the end is not written"),
        (BLOCKS, "and.b32 %r0, %r0, -2;", "the end is not written"),
        (BLOCKS, "or.b32 %r0, %r0, 1;", "the first program does not write the first element"),
        (BLOCKS, "add.s32 %r1, %r1, %r0;\nand.b32 %r1, %r1, 31;", None),
        (BLOCKS, "shl.b32 %r1, %r1, 1;", "expected 532611 programs for blocks [63]"),
        (BLOCKS, "setp.lt.s32 %p0, %r0, 1048575;\n@%p0 min.s32 %r0, %r0, 9;", "two programs"),
    ],
)
def test_the_blocks_of_a_grid(programs, change, error):
    numbers = Stand(torch.float32, (32 * BLOCKS,), (1,), 0, allocated=256 * BLOCKS)
    code = Code(kernel_of(GRID.format(change=change)))
    launch = HugeCard().launch(code, programs, 32, 0, [numbers])
    with pytest.raises(AssertionError, match=re.escape(error)) if error else nullcontext():
        grids.check_blocks("numbers", launch, *grids.region(numbers))
