"""Changes of single instructions in compiled kernels that tests/ptx must find."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from support.ops.calls import TERMS, mlp_call, similarity_call
from support.ops.compare import Case

pytest.importorskip("triton", reason="the package triton is not installed")

import ptx
from ptx.capture import Started
from support.kernels import mutants

# Launches of calls with tiles at the edge of the matrix, and where kernels copy, multiply and
# reduce.
CALLS = {
    "bf16": (
        similarity_call(70, 133, 20, terms=TERMS, width=80, teacher_width=48, ids=True),
        torch.bfloat16,
    ),
    "fp32": (similarity_call(70, 133, 20, terms=TERMS[:1], width=80), torch.float32),
    "mlp": (mlp_call(130, 72, 200, 40), torch.bfloat16),
}
# A kind, and which of the instructions that it fits: the first, the last, or all together, since
# single waits and barriers of a pipelined loop are redundant.
TWELVE = {
    "no barrier": slice(None),
    "a wait for one group fewer": slice(None),
    "no end of a group": slice(None),
    "copied elsewhere": slice(1),
    "copied from elsewhere": slice(1),
    "ldmatrix: registers exchanged": slice(1),
    "mma: left registers exchanged": slice(1),
    "loaded from elsewhere": slice(-1, None),
    "stored with no mask": slice(-1, None),
    "maximum": slice(1),
    "another lane": slice(1),
    "a choice exchanged": slice(1),
}


def started(*names: str) -> list[Started]:
    """Returns the launches of calls, one of each kernel's form."""
    launches: dict[int, Started] = {}
    for name in names:
        call, dtype = CALLS[name]
        with ptx.card(86, compare=lambda each: launches.setdefault(id(each.launch.code), each)):
            Case(call, dtype, "triton", call.needed()).run()
    return list(launches.values())


@pytest.fixture(scope="module")
def gradient():
    (launch,) = (each for each in started("bf16") if each.name == "_similarity_gradient_kernel")
    return launch


@pytest.mark.slow
def test_a_kernel_without_a_change_is_right(gradient):
    assert mutants.found_by(gradient, gradient.launch.code.kernel) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", TWELVE)
def test_twelve_kinds(gradient, name):
    kind, kernel = mutants.KINDS[name], gradient.launch.code.kernel
    every = mutants.places(kind, gradient.launch.code)
    assert every
    chosen = set(every[TWELVE[name]])
    assert mutants.found_by(gradient, mutants.mutant(kernel, kind, chosen))


@pytest.mark.prove
def test_many():
    """Most of the rest are equal programs: a second wait, a bound that the data do not reach, a sum
    of equal lanes.
    """
    count = Counter()
    found = Counter()
    missed = []
    for launch, name, place in mutants.sample(started(*CALLS), 300):
        kernel = launch.launch.code.kernel
        how = mutants.found_by(launch, mutants.mutant(kernel, mutants.KINDS[name], {place}))
        count[name] += 1
        found[name] += bool(how)
        if not how:
            missed.append(f"{kernel.name}: {name}: {kernel.instructions[place]}")
    print(
        *(f"{name:42} {count[name]:4} {found[name]:4}" for name in mutants.KINDS), *missed, sep="\n"
    )
    assert found.total() >= 0.8 * count.total()
