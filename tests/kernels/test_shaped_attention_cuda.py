"""shaped_attention's CUDA C++ kernels as nvcc compiles them, executed by tests/ptx: values,
gradients, hazards.

With --prove: every width with every number of tokens, five architectures, and all faults.
"""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch

from simplclip.selftest.calls import Call, attention_call, of_lengths
from support.ops.compare import Case, check_padding

pytest.importorskip("triton", reason="the package triton is not installed")

from ptx.machine import Code, EndlessLoopError, Variant
from ptx.overflow import overflows
from ptx.parse import Kernel
from simplclip.ops import backends, checks
from support.kernels import cuda_attention as attention
from support.kernels import mutants
from support.kernels.cuda_attention import TYPES

pytestmark = pytest.mark.long


if attention.why_not():
    pytest.skip(f"kernels cannot be compiled here: {attention.why_not()}", allow_module_level=True)

TOKENS = (1, 2, 15, 16, 17, 50, 64, 77, 80)
WIDTHS = (32, 64, 80, 96, 128)
# Logits are 0, s, 2 s, ...: a row's softmax is one at the largest, and has no gradient.
LARGE = attention_call(1, 33, 1, 32, causal=True, scale=1e7 / 3)
LARGE.tensors["q"] = torch.eye(32).double()[0].expand(1, 33, 1, 32)
LARGE.tensors["k"] = torch.arange(33)[:, None, None] * LARGE.tensors["q"]
APART = dict.fromkeys(("q", "k", "v", "grad out"), "rows_apart")


def case_of(call: Call, kind: str) -> Case:
    return Case(call, TYPES[kind], "cuda", call.needed(), tf32=kind == "tf32", layouts=APART)


def check(call: Call, kind: str, sm: int = 86, variant: Variant | None = None) -> None:
    with attention.card(sm, tf32=kind == "tf32", variant=variant):
        case_of(call, kind).check(roundings=True)


def check_lengths(tokens: int, width: int, kind: str, sm: int = 86) -> None:
    """Checks all tokens, and sequences of several lengths in a batch with two heads."""
    for causal in (False, True):
        check(attention_call(1, tokens, 1, width, causal=causal), kind, sm)
        several = attention_call(3, tokens, 2, width, causal=causal)
        check(of_lengths(several, [tokens // 2, 0, tokens]), kind, sm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "width", "kind"),
    [
        (50, 32, "f16"),
        (77, 80, "bf16"),  # two slices, of which the last is narrower
        (33, 80, "tf32"),
        (1, 128, "bf16"),
    ],
)
def test_values_and_gradients(tokens, width, kind):
    check_lengths(tokens, width, kind)


@pytest.mark.prove
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_more_values_and_gradients(tokens, kind, sm):
    for width in WIDTHS if sm == 86 else (WIDTHS[TOKENS.index(tokens) % 5],):
        if not backends.cuda_extension.shaped_attention_why_not(tokens, width, kind == "tf32"):
            check_lengths(tokens, width, kind, sm)


@pytest.mark.parametrize("kind", TYPES)
def test_addresses_are_computed_in_64_bits(kind):
    """Of 2^30 heads of sequences; tokens, widths and heads are at most 2^11."""
    for kernel in attention.compiled(kind, 86).values():
        assert not overflows(kernel, programs=1 << 30, sizes=1 << 11)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bf16", *(pytest.param(kind, marks=pytest.mark.prove) for kind in ("f16", "tf32"))]
)
def test_every_width(kind):
    for width in range(16, 129, 16):
        check(attention_call(1, 33, 1, width, causal=True), kind)


def test_a_scale_of_other_size_and_sign():
    for scale in (-0.5, 0.0, 4.0):
        check(attention_call(1, 77, 1, 32, scale=scale), "f16")


def test_large_logits():
    check(LARGE, "tf32")


@pytest.mark.parametrize("kind", TYPES)
def test_the_assembler_keeps_the_rounding_of_logits(kind):
    """ptxas may fuse mul.f32 into a subtraction, but not mul.rn.f32."""
    exponentials = 0
    for kernel in attention.compiled(kind, 86).values():
        made = {i.operands[0]: i for i in kernel.instructions if i.operands}
        for instruction in kernel.instructions:
            if instruction.opcode.startswith("ex2"):
                difference = made[made[instruction.operands[1]].operands[1]]
                assert difference.opcode == "sub.f32", difference
                logit = made[difference.operands[1]]
                assert logit.opcode != "mul.f32", logit
                exponentials += 1
    assert exponentials


def test_padded_tokens_are_not_read():
    with attention.card(86, tf32=False):
        for causal in (False, True):
            check_padding(torch.bfloat16, "cuda", causal, width=32)


def test_lengths_out_of_range_count_as_none_and_all():
    given = mock.patch.object(checks, "lengths_of_batch", lambda lengths, *others: lengths.int())
    with given, attention.card(86, tf32=False):
        inside, outside = (
            case_of(of_lengths(attention_call(2, 33, 1, 32), lengths), "bf16").run()
            for lengths in ([0, 33], [-5, 70])
        )
    for name, value in inside.items():
        assert torch.equal(outside[name], value), name


def test_softmax_minus_mean_is_rounded_after_the_subtraction():
    """Where q is zero, softmax equals the mean, and with equal gains nothing is left."""
    call = attention_call(1, 77, 1, 64, scale=0.3)
    call.tensors["q"] *= 1e-3
    call.tensors |= {
        name: torch.tensor([gain]).double()
        for name, gain in (("alpha", 0), ("beta", 1), ("gamma", 1))
    }
    case = case_of(call, "bf16")
    with attention.card(86, tf32=False):
        results = case.run()
    truth = case.by_definition(torch.Tensor.double)
    for name in ("out", "d_v"):
        largest = truth[name].abs().max()
        assert largest < 0.01
        assert (results[name] - truth[name]).abs().max() < 0.01 * largest, name


LENGTHS = of_lengths(attention_call(2, 50, 1, 64), [50, 17])
# Kinds of changes, of all instructions that they fit, and the type in which a call detects them.
FAULTS = {
    "no barrier": ("bf16", "while another thread"),
    "ldmatrix: registers exchanged": ("f16", "error"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_detected(name):
    fault = mutants.KINDS[name]
    kind, message = FAULTS[name]

    def changed(kernel: Kernel) -> Kernel:
        return mutants.mutant(kernel, fault, mutants.places(fault, Code(kernel), executed=False))

    with pytest.raises(AssertionError, match=re.escape(message)):
        check(LENGTHS, kind, variant=changed)


@pytest.mark.prove
@pytest.mark.parametrize("kind", TYPES)
def test_many_faults(kind):
    """Prints the changes of one instruction that no call detects."""
    calls = LENGTHS, attention_call(1, 33, 1, 80), LARGE
    attention.code_of.cache_clear()  # of what other tests executed
    for call in calls:
        check(call, kind)
    codes = [attention.code_of(kind, 86, name, None) for name in ("forward", "backward")]
    missed = []
    sample = mutants.sample(codes, 60)
    for code, name, place in sample:
        chosen = code.kernel

        def changed(kernel: Kernel) -> Kernel:
            if kernel.name != chosen.name:  # noqa: B023
                return kernel
            return mutants.mutant(kernel, mutants.KINDS[name], {place})  # noqa: B023

        try:
            for call in calls:
                check(call, kind, variant=changed)
        except (AssertionError, EndlessLoopError):
            continue
        missed.append(f"{chosen.name}: {name}: {chosen.instructions[place]}")
    print(f"{len(sample) - len(missed)} of {len(sample)}", *missed, sep="\n")
    assert len(missed) <= 0.2 * len(sample)
