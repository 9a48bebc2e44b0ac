"""The Triton kernels as compiled for a card, executed by tests/ptx, against plain torch in float64.

Each launch is also compared by itself with its definition (tests/support/launches.py), and every hazard is an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from calls import TERMS, Call, attention_call, mlp_call, of_lengths, similarity_call
from compare import Case

pytest.importorskip("triton", reason="the package triton is not installed")

import launches
import ptx
import triton
from packaging.version import Version
from ptx.capture import CODES, Started

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
ARCHITECTURES = (80, 86, 89, 90, 120)
ACTIVATIONS = ("gelu", "gelu_tanh", "quickgelu", "relu", "silu")


def pairs(n: int, m: int, *terms: str, **options) -> Callable[[], Call]:
    return functools.partial(similarity_call, n, m, (m - n) // 2, terms=terms or TERMS, **options)


def lengths(values: list[int] | None, *shape: int, **options) -> Callable[[], Call]:
    return lambda: of_lengths(attention_call(*shape, **options), values)


BLOCKS = {"scratch_bytes": 0}  # of 128 x 128, the least
FEW = 4  # multiprocessors, so that a program has several tiles of columns
QUICK: dict[str, Callable[[], Call]] = {
    "similarity_loss": pairs(70, 133, width=80, teacher_width=48, ids=True),
    "parallel_mlp": functools.partial(mlp_call, 130, 72, 200, 40),
    "shaped_attention": lengths([40, 0, 81], 3, 81, 2, 64, causal=True),
}
CALLS: dict[str, Callable[[], Call]] = {
    **QUICK,
    "contrastive": pairs(256, 384, "contrastive", width=512),
    "contrastive, one pair": pairs(1, 1, "contrastive", width=64),
    "contrastive, one side": pairs(70, 133, "contrastive", width=72, ids=True, symmetric=False),
    "contrastive, odd width": pairs(65, 129, "contrastive", width=100),
    "contrastive, blocks": pairs(300, 400, "contrastive", width=40, ids=True, **BLOCKS),
    "contrastive, many parts": pairs(1030, 1111, "contrastive", width=16),
    "pair matching": pairs(70, 133, *TERMS[:2], width=64),
    "pair matching, one side, ids": pairs(70, 133, *TERMS[:2], width=72, ids=True, symmetric=False),
    "pair matching, blocks": pairs(200, 300, *TERMS[:2], width=72, ids=True, **BLOCKS),
    "pair matching, hadamard": pairs(70, 133, *TERMS[:2], width=64, plane="hadamard"),
    "relational": pairs(129, 129, "relational", width=64),
    "relational, one side": pairs(70, 133, "relational", width=64, symmetric=False),
    "every term": pairs(129, 129, width=64),
    "every term, blocks": pairs(300, 257 + 43, width=64, teacher_width=112, ids=True, **BLOCKS),
    "every term, cross-entropy": pairs(70, 133, width=80, teacher_width=31, divergence="cross_entropy"),
    "every term, one side, ids": pairs(70, 133, width=64, ids=True, symmetric=False, teacher_width=96),
    "scale 1000": pairs(70, 70, width=64, scale=1000.0),
    "scale -50": pairs(70, 70, width=64, scale=-50.0),
    "sigmoid": pairs(70, 133, "sigmoid", width=64),
    "sigmoid, ids, blocks": pairs(200, 300, "sigmoid", width=80, ids=True, **BLOCKS),
    "two sigmoids": pairs(70, 133, "sigmoid", "pair_matching", width=72, weights={"sigmoid": 1.0, "pair_matching": 0.5}),
    **{f"parallel_mlp, {act}": functools.partial(mlp_call, 150, 64, 150, 40, act=act) for act in ACTIVATIONS},
    "parallel_mlp, chunks": functools.partial(mlp_call, 200, 40, 70, 20),
    "attention": lengths(None, 2, 145, 2, 64),
    "attention, causal": lengths(None, 2, 81, 1, 48, causal=True),
    "attention, wide": lengths([33, 0], 2, 40, 1, 128),
    "attention, narrow, scale -2": lengths(None, 2, 130, 1, 20, scale=-2.0),
}


@dataclass
class Row:
    """What the calls of an op in a dtype on an architecture showed; errors are in parts of what is allowed."""

    calls: int = 0
    launches: int = 0
    seconds: float = 0.0  # of a processor, of the launches' execution
    error: tuple[float, str] = 0.0, ""
    launch_error: tuple[float, str] = 0.0, ""


TABLE: dict[tuple[int, str, str], Row] = defaultdict(Row)


def run(name: str, kind: str, sm: int, *, need: list[str] | None = None) -> None:
    call = CALLS[name]()
    row = TABLE[sm, name.partition(",")[0], kind]

    def compare(started: Started) -> None:
        row.launch_error = max(row.launch_error, (launches.check(started), started.name))

    backend = "sdpa" if call.op == "shaped_attention" else "triton"
    options = {"processors": FEW} if "blocks" in name or "every" in name else {}
    few_rows = mock.patch("simplclip.kernels.mlp.op.SCRATCH_BYTES", 0) if "chunks" in name else contextlib.nullcontext()
    case = Case(call, KINDS[kind], backend, call.needed() if need is None else need, tf32=kind == "tf32")
    with few_rows, ptx.card(sm, tf32=kind == "tf32", compare=compare, **options) as machine:
        errors = case.check(roundings=True)
    assert machine.launches
    row.calls, row.launches, row.seconds = row.calls + 1, row.launches + machine.launches, row.seconds + machine.seconds
    row.error = max(row.error, *((error, f"{result} of {name}") for result, error in errors.items()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_ops(name, kind):
    run(name, kind, 86)


@pytest.mark.prove
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(CALLS)[len(QUICK) :])
def test_all_calls(name, kind):
    run(name, kind, 86)
    if "sigmoid" in name:  # values alone are another form
        run(name, kind, 86, need=[])


@pytest.mark.prove
@pytest.mark.parametrize("sm", [sm for sm in ARCHITECTURES if sm != 86])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_other_architectures(name, kind, sm):
    if sm == 90 and Version(triton.__version__) < Version("3.9"):
        pytest.skip("Triton 3.6 has no fence.proxy.async between cp.async and wgmma, which tests/ptx reports")
    run(name, kind, sm)


def coverage(sm: int) -> dict[str, tuple[int, int, set[str]]]:
    """Returns for each kernel the number of instructions in all its forms, of those executed, and where others are."""
    table = {}
    for (kernel, architecture), codes in CODES.items():
        if architecture == sm:
            done = [(each, executed) for code in codes for each, executed in zip(code.kernel.instructions, code.executed)]
            missing = {each.source for each, executed in done if not executed}
            table[kernel] = len(done), sum(executed for _, executed in done), missing
    return table


@pytest.mark.prove
def test_coverage():
    """The calls above execute what is compiled for sm_86. Prints what they showed, and what of each kernel they leave."""
    if not CODES:
        pytest.skip("no call has run in this process")
    print(f"Triton {triton.__version__}: calls, launches, seconds; worst error of a result, of a launch")
    for (sm, op, kind), row in sorted(TABLE.items()):
        worst = "".join(f"  {error:.3f} {name:60}" for error, name in (row.error, row.launch_error))
        print(f"sm_{sm:<4}{op:24}{kind:5}{row.calls:5}{row.launches:6}{row.seconds:7.1f}{worst}")
    opcodes = {each.opcode for codes in CODES.values() for code in codes for each in code.kernel.instructions}
    print(len(opcodes), "opcodes:", *sorted(opcodes))
    table = coverage(86)
    for kernel, (count, executed, missing) in table.items():
        print(f"{kernel:40} {count:7} {executed / count:7.1%}  {', '.join(sorted(missing))}")
    assert sum(executed for _, executed, _ in table.values()) >= 0.97 * sum(count for count, *_ in table.values())
