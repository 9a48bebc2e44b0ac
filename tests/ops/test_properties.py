"""Random calls of every op against float64 (random_calls): 2,000 calls, or the number in --cases.

pytest tests/ops/test_properties.py --cases 20000
pytest tests/ops/test_properties.py --first-case 1234 --cases 1       repeats the call of a failure
"""

import collections
import itertools

import pytest

from simplclip.common.terms import SWEPT
from simplclip.ops import backends
from support.ops import compare, layouts, random_calls

pytestmark = pytest.mark.long


def expect_none(failed, block):
    again = "again: pytest tests/ops/test_properties.py --cases 1 --first-case NUMBER"
    assert not failed, f"{len(failed)} of {len(block)} calls failed ({again})\n" + "\n".join(failed)


@pytest.mark.instruction_set
def test_random_calls(block):
    """In any layout of tensors and of incoming gradients."""
    expect_none(random_calls.failures(block), block)


@pytest.mark.instruction_set
def test_nan_and_infinity_reach_the_result(block):
    """In every fifth call, each small tensor in turn gets a NaN or infinity."""
    expect_none(random_calls.failures(block[::5], random_calls.check_nonfinite), block[::5])


def test_random_calls_around_sdpa():
    block = range(40)
    expect_none(random_calls.failures(block, backend="sdpa"), block)


def test_draws_cover_the_ops():
    cases = [random_calls.make(seed) for seed in range(1000)]
    assert {case.call.op for case in cases} == set(random_calls.PLAIN)
    assert {case.dtype for case in cases} == set(random_calls.FLOATS)
    native = {"cpu"} if backends.extension else set()
    assert {case.backend for case in cases} == {"", "reference"} | native
    assert {kind for case in cases for kind in case.layouts.values()} == {
        *layouts.SAME,
        *layouts.OTHER,
    }
    assert any(not case.need for case in cases)
    assert any(0 < len(case.need) < len(case.call.needed()) for case in cases)
    options = collections.defaultdict(set)
    for name, value in itertools.chain(*(case.call.options.items() for case in cases)):
        options[name].add(frozenset(value) if name == "terms" else str(value))
    assert options["terms"] > {frozenset(SWEPT), *[frozenset([term]) for term in SWEPT]}
    assert options["divergence"] == {"kl", "cross_entropy"}
    assert {"weights", "scratch_bytes", "logit_scale", "teacher_scale"} <= options.keys()
    for name in ("symmetric", "causal", "recompute", "normalize"):
        assert options[name] == {"True", "False"}


@pytest.mark.slow
def test_a_wrong_result_fails(monkeypatch):
    """A gradient that is wrong by a tenth fails in every op."""
    original = compare.Case.run

    def wrong(case):
        results = original(case)
        return {name: t * 1.1 if name.startswith("d_") else t for name, t in results.items()}

    monkeypatch.setattr(compare.Case, "run", wrong)
    failed = random_calls.failures(range(100))
    cases = [random_calls.make(seed) for seed in range(100)]
    ops = collections.Counter(cases[int(text.split()[1].rstrip(":"))].call.op for text in failed)
    expected = collections.Counter(case.call.op for case in cases if case.need)
    for op in random_calls.PLAIN:
        assert ops[op] > 0.6 * expected[op], f"{op}: {ops[op]} of {expected[op]} failed"
