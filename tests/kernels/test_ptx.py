"""The Triton kernels as compiled for a card, executed by tests/ptx, against plain torch in float64.

Each launch is also compared by itself with its definition
(tests/support/kernels/launches.py), and every hazard is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support.kernels.calls import (
    CALLS,
    KINDS,
    QUICK,
    QUICK_IN_BF16,
    case_of,
    kernels_alone,
    skip_without_fence,
)

pytest.importorskip("triton", reason="the package triton is not installed")

import ptx
from ptx.capture import Started
from ptx.machine import Code
from ptx.overflow import overflows
from simplclip.kernels.similarity.blocks import range_factor
from simplclip.kernels.similarity.launch import _merge
from simplclip.kernels.similarity.plan import ROW_SLOTS, column_slots
from support.kernels import launches

pytestmark = pytest.mark.long


FEW = 4  # multiprocessors, so that a program has several tiles of columns
ARCHITECTURES = (80, 86, 89, 90, 120)
FEW_OF = {"stat": 8, "tiles_per_split": 8}  # of these sizes, where others are large
# kernel -> the code of its forms for sm_86 that the calls of this file started
FORMS: dict[str, set[Code]] = defaultdict(set)


def checked(started: Started) -> None:
    """Checks the addresses of a launch, and what it wrote."""
    places = {name: place for place, name in enumerate(started.parameters)}
    few = {places[name]: bound for name, bound in FEW_OF.items() if name in places}
    assert not overflows(started.launch.code.kernel, named=few)
    launches.check(started)


def noted(started: Started) -> None:
    """Notes the code of a launch, and checks it."""
    FORMS[started.name].add(started.launch.code)
    checked(started)


def run(name: str, kind: str, sm: int, *, need: list[str] | None = None) -> None:
    case = case_of(name, kind, need=need)
    kept = sm == 86
    processors = FEW if "blocks" in name or "every" in name else None
    options = {"tf32": case.tf32, "processors": processors}
    compare = noted if kept else checked
    with kernels_alone(name), ptx.card(sm, compare=compare, **options) as machine:
        case.check(roundings=True)
    assert machine.launches
    if not kept:
        machine.forget()


# attention's kernels multiply no matrices: in TF32 they are those of float32
EVERY = [
    (name, kind)
    for name, kind in itertools.product(CALLS, KINDS)
    if kind != "tf32" or "attention" not in name
]
SUITE = [
    (name, kind)
    for name, kind in EVERY
    if name in QUICK or (name in QUICK_IN_BF16 and kind == "bf16")
]


# what the suite runs in bfloat16 for sm_90, which has tiles of its own
SUITE_90 = ("contrastive, odd width", "pair matching, ids, odd width", "parallel_mlp")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), SUITE)
def test_ops(name, kind):
    run(name, kind, 86)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE_90)
def test_tiles_of_sm_90(name):
    skip_without_fence(name, "bf16", 90)
    run(name, "bf16", 90)


@pytest.mark.prove
@pytest.mark.parametrize(("name", "kind"), [each for each in EVERY if each not in SUITE])
def test_all_calls(name, kind):
    run(name, kind, 86)
    if "sigmoid" in name:  # values alone are another form
        run(name, kind, 86, need=[])


@pytest.mark.prove
@pytest.mark.parametrize("sm", [sm for sm in ARCHITECTURES if sm != 86])
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_other_architectures(name, kind, sm):
    skip_without_fence(name, kind, sm)
    run(name, kind, sm)


@pytest.mark.prove
@pytest.mark.parametrize("largest", [1e3, torch.inf])
def test_range_of_many_rows(largest):
    """More rows and columns than a block has, and an infinite bound."""
    n, m = 5003, 4100
    features = SimpleNamespace(image=torch.empty(n, 1).half(), text=torch.empty(m, 1).half())
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(-20.0)
    planes = (None, draw(2))

    with ptx.card(86, compare=noted) as machine:
        for teacher, plane, position in itertools.product((False, True), planes, (0, 2047, 4099)):
            rows, columns = draw(6, n), draw(3, m)
            rows[:, position] = columns[:, position] = largest
            inputs = {"scale": scale, "plane": plane, "HAS_TEACHER": teacher}
            range_factor(features, **inputs, grad_rows=rows, grad_columns=columns)
            range_factor(features, **inputs, grad_rows=rows)
        for terms in (1, 2):
            range_factor(features, sigmoids=largest * draw(5, terms), TERMS=terms)
    assert machine.launches == 26


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_merge_of_many_parts(count):
    """The merge kernel with more parts than a block has; a call with so many takes minutes."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(count))

    def parts(slots: int) -> Tensor:
        drawn = draw(count, slots, 133)
        drawn[:, 1::2] = drawn[:, 1::2].abs() + 1  # sums of exponentials
        return drawn

    with ptx.card(86, compare=noted) as machine:
        for has_teacher, other_form in itertools.product((False, True), repeat=2):
            call = SimpleNamespace(has_teacher=has_teacher)
            _merge(call, parts(ROW_SLOTS), draw(6, 150), 9, plane=other_form)
            _merge(call, parts(column_slots(call)), draw(3, 150), 9, previous=other_form)
    assert machine.launches == 8


@pytest.mark.prove
def test_coverage():
    """The calls above, together, execute what is compiled for sm_86; prints what they leave."""
    if not FORMS:
        pytest.skip("no call has run in this process")
    too_few = []
    for name, forms in FORMS.items():
        instructions = [each for code in forms for each in code.kernel.instructions]
        executed = [each for code in forms for each in code.executed]
        share = sum(executed) / len(executed)
        others = {each.source for each, done in zip(instructions, executed) if not done}
        print(f"{name:40} {len(executed):7} {share:7.1%}  {', '.join(sorted(others))}")
        if share < 0.97:
            too_few.append(name)
    assert not too_few
