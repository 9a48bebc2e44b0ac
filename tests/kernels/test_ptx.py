"""The Triton kernels as compiled for a card, executed by tests/ptx, against plain torch in float64.

Each launch is also compared by itself with its definition
(tests/support/kernels/launches.py), and every hazard is an error.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
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

import triton

import ptx
from ptx.capture import Started
from ptx.machine import Code, Variant
from simplclip.kernels.similarity.blocks import range_factor
from simplclip.kernels.similarity.launch import _merge
from simplclip.kernels.similarity.plan import ROW_SLOTS, column_slots
from support.kernels import launches

pytestmark = pytest.mark.long


FEW = 4  # multiprocessors, so that a program has several tiles of columns
ARCHITECTURES = (80, 86, 89, 90, 120)


@dataclass
class Row:
    """What the calls of an op in a dtype on an architecture showed; errors are in parts of what is
    allowed.
    """

    calls: int = 0
    launches: int = 0
    seconds: float = 0.0  # of a processor, of the launches' execution
    error: tuple[float, str] = 0.0, ""
    launch_error: tuple[float, str] = 0.0, ""


TABLE: dict[tuple[str, str, str], Row] = defaultdict(Row)
# kernel -> the code of its forms for sm_86 that the calls of this file started
FORMS: dict[str, set[Code]] = defaultdict(set)
OPCODES: set[str] = set()  # of all forms


def checked(started: Started, sm: int, plain: bool = True) -> float:
    """Notes the code of a launch, and returns its largest error in parts of what is allowed.

    plain: whether the code runs as it was compiled.
    """
    code = started.launch.code
    if sm == 86 and plain:
        FORMS[started.name].add(code)
    OPCODES.update(each.opcode for each in code.kernel.instructions)
    return launches.check(started)


def run(
    name: str,
    kind: str,
    sm: int,
    *,
    need: list[str] | None = None,
    variant: Variant | None = None,
) -> None:
    target = f"{variant.__name__} sm_{sm}" if variant else f"sm_{sm}"
    case, row = case_of(name, kind, need=need), TABLE[target, name.partition(",")[0], kind]

    def compare(started: Started) -> None:
        error = checked(started, sm, plain=variant is None)
        row.launch_error = max(row.launch_error, (error, started.name))

    processors = FEW if "blocks" in name or "every" in name else None
    options = {"tf32": case.tf32, "processors": processors, "variant": variant}
    with kernels_alone(name), ptx.card(sm, compare=compare, **options) as machine:
        errors = case.check(roundings=True)
    assert machine.launches
    if sm != 86 or variant:
        machine.forget()
    row.calls = row.calls + 1
    row.launches = row.launches + machine.launches
    row.seconds = row.seconds + machine.seconds
    row.error = max(
        row.error, *((error, f"{result} of {name}") for result, error in errors.items())
    )


SUITE = [*itertools.product(QUICK, KINDS), *itertools.product(QUICK_IN_BF16, ["bf16"])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), SUITE)
def test_ops(name, kind):
    run(name, kind, 86)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "kind"), [each for each in itertools.product(CALLS, KINDS) if each not in SUITE]
)
def test_all_calls(name, kind):
    run(name, kind, 86)
    if "sigmoid" in name:  # values alone are another form
        run(name, kind, 86, need=[])


@pytest.mark.prove
@pytest.mark.parametrize("sm", [sm for sm in ARCHITECTURES if sm != 86])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_other_architectures(name, kind, sm):
    skip_without_fence(name, kind, sm)
    run(name, kind, sm)


@pytest.mark.prove
@pytest.mark.parametrize("variant", [ptx.fused, ptx.noisy])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_variants(name, kind, variant):
    run(name, kind, 86, variant=variant)


@pytest.mark.prove
@pytest.mark.parametrize("largest", [1e3, torch.inf])
def test_range_of_many_rows(largest):
    """The range kernel with more rows and columns than a block has, and with an infinite bound.

    A whole call of this size would take minutes.
    """
    n, m = 5003, 4100
    features = SimpleNamespace(image=torch.empty(n, 1).half(), text=torch.empty(m, 1).half())
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(-20.0)
    planes = (None, draw(2))

    with ptx.card(86, compare=partial(checked, sm=86)) as machine:
        for teacher, plane, position in itertools.product((False, True), planes, (0, 2047, 4099)):
            rows, columns = draw(6, n), draw(3, m)
            rows[:, position] = columns[:, position] = largest
            inputs = {"scale": scale, "plane": plane, "HAS_TEACHER": teacher}
            range_factor(features, **inputs, grad_rows=rows, grad_columns=columns)
            range_factor(features, **inputs, grad_rows=rows)
        for terms in (1, 2):
            range_factor(features, sigmoids=largest * draw(5, terms), TERMS=terms)
    assert machine.launches == 26


@pytest.mark.prove
@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_merge_of_many_parts(count):
    """The merge kernel with more parts than a block has; a call with so many takes minutes."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(count))

    def parts(slots: int) -> Tensor:
        drawn = draw(count, slots, 133)
        drawn[:, 1::2] = drawn[:, 1::2].abs() + 1  # sums of exponentials
        return drawn

    with ptx.card(86, compare=partial(checked, sm=86)) as machine:
        for has_teacher, other_form in itertools.product((False, True), repeat=2):
            call = SimpleNamespace(has_teacher=has_teacher)
            _merge(call, parts(ROW_SLOTS), draw(6, 150), 9, plane=other_form)
            _merge(call, parts(column_slots(call)), draw(3, 150), 9, previous=other_form)
    assert machine.launches == 8


@dataclass
class Coverage:
    """Instructions of a kernel in all its forms."""

    count: int
    executed: int
    others: set[str]  # the lines in the source of those that are not executed


def coverage(forms: set[Code]) -> Coverage:
    instructions = []
    executed = []
    for code in forms:
        instructions += code.kernel.instructions
        executed += code.executed
    others = {each.source for each, done in zip(instructions, executed) if not done}
    return Coverage(len(instructions), sum(executed), others)


@pytest.mark.prove
def test_coverage():
    """The calls above, all together, execute what is compiled of each kernel for sm_86.

    Prints what they showed, and what of each kernel they leave.
    """
    if not FORMS:
        pytest.skip("no call has run in this process")
    print(
        f"Triton {triton.__version__}: calls, launches, seconds; worst error of a result, of a "
        "launch"
    )
    for (target, op, kind), row in sorted(TABLE.items()):
        worst = "".join(f"  {error:.3f} {name:60}" for error, name in (row.error, row.launch_error))
        print(f"{target:12}{op:24}{kind:5}{row.calls:5}{row.launches:6}{row.seconds:7.1f}{worst}")
    print(len(OPCODES), "opcodes:", *sorted(OPCODES))
    too_few = []
    for name, forms in FORMS.items():
        kernel = coverage(forms)
        share = kernel.executed / kernel.count
        print(f"{name:40} {kernel.count:7} {share:7.1%}  {', '.join(sorted(kernel.others))}")
        if share < 0.97:
            too_few.append(name)
    assert not too_few
