"""shaped_attention's CUDA C++ kernels as nvcc compiles them, executed by tests/ptx: values, gradients, log-sum-exps, hazards.

With --prove: every width with every number of tokens, five architectures, and all faults.
"""

from __future__ import annotations

import re
from unittest import mock

import pytest
import shaped_attention_ptx as attention
import torch
from paths import ROOT
from shaped_attention_ptx import TYPES, Case, by_reference, check, execute, inputs

if attention.why_not():
    pytest.skip(f"kernels cannot be compiled here: {attention.why_not()}", allow_module_level=True)

TOKENS = (1, 2, 15, 16, 17, 50, 64, 77, 80)
WIDTHS = (32, 64, 80, 96, 128)


def cases(tokens, width, kind):
    """Yields all tokens, and sequences of several lengths in a batch with two heads; nothing if tokens do not fit."""
    if kind == "tf32" and tokens > 64 and width > 64:
        return
    for causal in (False, True):
        yield Case(kind, tokens, width, causal)
        yield Case(kind, tokens, width, causal, lengths=(tokens // 2, 0, tokens), batch=3, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("tokens", "width"), [(77, 64), (33, 80), (1, 128), (50, 32)])
def test_values_and_gradients(tokens, width, kind):
    for case in cases(tokens, width, kind):
        check(case)


@pytest.mark.prove
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_more_values_and_gradients(tokens, kind, sm):
    for width in WIDTHS if sm == 86 else (WIDTHS[TOKENS.index(tokens) % 5],):
        for case in cases(tokens, width, kind):
            check(case, sm)


@pytest.mark.slow
def test_every_width():
    for kind in TYPES:
        for width in range(16, 129, 16):
            check(Case(kind, 33, width, causal=True))


def test_a_scale_of_other_size_and_sign():
    for scale in (-0.5, 0.0, 4.0):
        check(Case("f16", 77, 32, scale=scale))


def test_lengths_out_of_range_count_as_none_and_all():
    inside, outside = Case("bf16", 33, 32, lengths=(0, 33), batch=2), Case("bf16", 33, 32, lengths=(-5, 70), batch=2)
    given = inputs(inside)
    expected = execute(inside, given)
    results = execute(outside, given | {"lengths": torch.tensor(outside.lengths, dtype=torch.int32)})
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_softmax_minus_mean_is_rounded_after_the_subtraction():
    """At initialisation q is zero: softmax equals the mean, and with equal gains their difference is zero."""
    case = Case("bf16", 77, 64)
    given = inputs(case)
    given["q"].mul_(1e-3)
    given["gains"].copy_(torch.tensor([[0.0], [1.0], [1.0]]))
    truth, results = by_reference(case, given, torch.float64), execute(case, given)
    for name in ("out", "dv"):
        largest = truth[name].abs().max()
        assert largest < 0.01
        assert (results[name] - truth[name]).abs().max() < 0.01 * largest, name


# Text that is removed or replaced in the kernels, a case that must detect the change, and by what.
FAULTS = {
    "no barrier before keys and values are written over": (
        "  sync_block();  // keys and values are not read any more", "", Case("bf16", 77, 64), "while another warp",
    ),
    "no barrier before a slot is filled again": (
        "if (s + 2 < 2 * slices) sync_block();", "", Case("tf32", 77, 64), "while another warp",
    ),
    "a wait for one group fewer": ("cp_async_wait<1>();", "cp_async_wait<2>();", Case("f16", 77, 64), "or a copy writes it"),
    "a fragment's halves exchanged": (
        "(lane() & 7) + (lane() >> 4) * 8, chunk + (lane() >> 3 & 1)", "(lane() & 15), chunk + (lane() >> 4)",
        Case("f16", 16, 32), "error",
    ),
    "a transposed fragment's halves exchanged": (
        "column_tile * 2 + (lane() >> 3 & 1)", "column_tile * 2 + (lane() >> 3 & 1 ^ 1)", Case("f16", 16, 32), "error",
    ),
    "rows of padding are multiplied": (
        "  if (tiles <= 0) return;", "", Case("bf16", 50, 64, lengths=(50, 17), batch=2), "read that was never written",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_detected(fault, tmp_path):
    old, new, case, message = FAULTS[fault]
    replaced = 0
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        replaced += old in text
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).write_text(text.replace(old, new))
    assert replaced
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    there = mock.patch.multiple(attention, ROOT=tmp_path, compiled=attention.compiled.__wrapped__)  # with no cache
    with there, pytest.raises(AssertionError, match=re.escape(message)):
        check(case)
