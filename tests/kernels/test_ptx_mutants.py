"""Changes of single instructions in compiled kernels that tests/ptx must find."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
import torch

from simplclip.common.terms import SWEPT as TERMS
from simplclip.selftest.calls import Call, mlp_call, similarity_call
from support.ops.compare import Case

pytest.importorskip("triton", reason="the package triton is not installed")

import ptx
from ptx.capture import Started
from ptx.machine import Code
from support.kernels import mutants
from support.kernels.few_lines import kernel_of
from support.kernels.launches import compare

# Launches of calls with tiles at the edge of the matrix, and where kernels copy, multiply and
# reduce.
CALLS = {
    "bf16": (
        similarity_call(70, 133, 20, terms=TERMS, width=80, teacher_width=48, ids=True),
        torch.bfloat16,
    ),
    "fp32": (similarity_call(70, 133, 20, terms=("contrastive",), width=80), torch.float32),
    "mlp": (mlp_call(193, 72, 200, 40), torch.bfloat16),
}
# Calls with the same code: of less than a tile, so that no mask is full, with longer loops, with
# many parts to merge, and with logits so large that exponentials overflow but for the right shift.
MORE_CALLS = (
    (similarity_call(3, 5, 1, terms=TERMS, width=16, teacher_width=16, ids=True), torch.bfloat16),
    (
        similarity_call(477, 500, 20, terms=TERMS, width=144, teacher_width=112, ids=True),
        torch.bfloat16,
    ),
    (similarity_call(3, 5, 1, terms=("contrastive",), width=16), torch.float32),
    (similarity_call(129, 200, 20, terms=("contrastive",), width=144), torch.float32),
    (mlp_call(113, 24, 8, 8), torch.bfloat16),
    (
        similarity_call(70, 133, 20, terms=TERMS, width=16, teacher_width=16, ids=True, scale=1e3),
        torch.bfloat16,
    ),
    (similarity_call(70, 133, 20, terms=("contrastive",), width=16, scale=1e3), torch.float32),
)
PROCESSORS = 4  # so few that a program computes several tiles
# A kind, and which of the instructions that it fits: the first, the last, or all together, since
# single waits of a pipelined loop are redundant. test_shaped_attention_cuda.py has other kinds.
CHOSEN = {
    "a wait for one group fewer": slice(None),
    "no end of a group": slice(None),
    "copied elsewhere": slice(1),
    "copied from elsewhere": slice(1),
    "mma: left registers exchanged": slice(1),
    "loaded from elsewhere": slice(-1, None),
    "stored with no mask": slice(-1, None),
    "maximum": slice(1),
    "another lane": slice(1),
    "a choice exchanged": slice(1),
}


def started(*calls: tuple[Call, torch.dtype]) -> dict[Code, list[Started]]:
    """Returns for each form of a kernel its first launch in each call."""
    launches: dict[Code, list[Started]] = defaultdict(list)
    for call, dtype in calls:
        first: dict[Code, Started] = {}
        keep = lambda each: first.setdefault(each.launch.code, each)  # noqa: B023, E731
        with ptx.card(86, compare=keep, processors=PROCESSORS):
            Case(call, dtype, "triton", call.needed()).run()
        for code, launch in first.items():
            launches[code].append(launch)
    return launches


@pytest.fixture(scope="module")
def gradient():
    for (launch,) in started(CALLS["bf16"]).values():
        if launch.name == "_similarity_gradient_kernel":
            return launch
    raise AssertionError("no launch of the gradient kernel")


@pytest.mark.slow
def test_a_kernel_without_a_change_is_right(gradient):
    assert mutants.found_by(gradient, gradient.launch.code.kernel) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_kinds(gradient, name):
    kind, kernel = mutants.KINDS[name], gradient.launch.code.kernel
    every = mutants.places(kind, gradient.launch.code)
    assert every
    chosen = set(every[CHOSEN[name]])
    assert mutants.found_by(gradient, mutants.mutant(kernel, kind, chosen))


def test_a_kind_that_changes_nothing_has_no_place():
    """Turning one register gives the same instruction."""
    one, four = (
        Code(kernel_of(f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [%r9];"))
        for count, registers in ((1, "%r0"), (4, "%r0, %r1, %r2, %r3"))
    )
    turned = mutants.KINDS["ldmatrix: registers exchanged"]
    assert not mutants.places(turned, one, executed=False)
    assert mutants.places(turned, four, executed=False) == [2]


def test_what_a_launch_writes_outside_of_its_results_is_an_error():
    """As if the diagonal kernel stored one row too many: to the next statistic."""
    image, text, rows = torch.ones(3, 8), torch.ones(5, 8), torch.full((6, 3), torch.nan)
    arguments = {"image": image, "text": text, "rows": rows, "stat": 3, "n": 3, "label_offset": 1}
    tensors = {"image": image, "text": text, "rows": rows}
    before = {name: t.clone() for name, t in tensors.items()}
    diagonal = Started("_similarity_diagonal_kernel", arguments, None, before, [])
    rows[3] = 8.0
    assert compare(diagonal) == {"positives": 0.0}
    rows[4, 0] = 8.0
    assert compare(diagonal) == {"positives": 0.0, "rows, outside": math.inf}


@pytest.mark.prove
def test_many():
    """Prints how many of each kind there are and are found, then the missed.

    More than half of the missed change nothing that a run could show, as masks that are full.
    """
    count, found = Counter(), Counter()
    missed = []
    launches = started(*CALLS.values(), *MORE_CALLS)
    for code, name, place in mutants.sample([*launches], 300):
        kernel = code.kernel
        mutant = mutants.mutant(kernel, mutants.KINDS[name], {place})
        count[name] += 1
        if any(mutants.found_by(launch, mutant) for launch in launches[code]):
            found[name] += 1
        else:
            missed.append(f"{kernel.name}: {name}: {kernel.instructions[place]}")
    for name in mutants.KINDS:
        print(f"{name:42} {count[name]:4} {found[name]:4}")
    print(f"{'all':42} {count.total():4} {found.total():4}", *missed, sep="\n")
    assert found.total() >= 0.8 * count.total()
