"""Random calls of every op against float64 (random_calls): 2,000, or as many as --cases says.

pytest tests/ops/test_properties.py --cases 50000
pytest tests/ops/test_properties.py --first-case 1234 --cases 1       the call of a failure again
"""

import collections

import layouts
import pytest
import random_calls
import torch

from simplclip.ops import backends


def test_random_calls(block):
    failed = random_calls.failures(block)
    again = "again: pytest tests/ops/test_properties.py --cases 1 --first-case NUMBER"
    assert not failed, f"{len(failed)} of {len(block)} calls failed ({again})\n" + "\n".join(failed)


def test_a_number_makes_the_same_call_again():
    first, second = random_calls.make(12), random_calls.make(12)
    assert str(first) == str(second)
    assert all(torch.equal(t, second.call.tensors[name]) for name, t in first.call.tensors.items())


def test_draws_cover_the_ops():
    """Every op, dtype, backend and layout; every option of similarity_loss; subsets of the gradients, none too."""
    cases = [random_calls.make(seed) for seed in range(1000)]
    assert {case.call.op for case in cases} == set(random_calls.PLAIN)
    assert {case.dtype for case in cases} == set(random_calls.FLOATS)
    assert {case.backend for case in cases} == ({"cpu", "reference"} if backends.extension else {"reference"})
    assert {kind for case in cases for kind in case.layouts.values()} == set(layouts.ALL)
    assert any(not case.need for case in cases)
    assert any(0 < len(case.need) < len(case.call.needed()) for case in cases)
    seen = collections.defaultdict(set)
    for case in cases:
        for name, value in case.call.options.items():
            seen[name].add(value if isinstance(value, (str, bool, tuple)) else type(value))
    assert seen["negatives"] == {"all", "shift", "hard"}
    assert seen["interactive"] == {"infonce", "kl"}
    assert seen["divergence"] == {"kl", "cross_entropy"}
    assert seen["symmetric"] == seen["causal"] == seen["recompute"] == seen["normalize"] == {True, False}
    assert {frozenset(terms) for terms in seen["terms"]} >= {frozenset([term]) for term in random_calls.TERMS}


def test_a_wrong_result_fails(monkeypatch):
    """A tenth off in one gradient of every op is found."""
    honest = random_calls.run

    def wrong(function, call, tensors, need, incoming):
        found = honest(function, call, tensors, need, incoming)
        if function is random_calls.function_of(call):
            found = {name: t * 1.1 if name.startswith("d_") else t for name, t in found.items()}
        return found

    monkeypatch.setattr(random_calls, "run", wrong)
    failed = random_calls.failures(range(200))
    ops = collections.Counter(random_calls.make(int(text.split()[1].rstrip(":"))).call.op for text in failed)
    for op in random_calls.PLAIN:
        wanting = sum(bool(case.need) for case in map(random_calls.make, range(200)) if case.call.op == op)
        assert ops[op] > 0.6 * wanting, f"{op}: {ops[op]} of {wanting} found"


@pytest.mark.parametrize("layout", layouts.OTHER.values())
def test_constant_layouts_repeat_the_first(layout):
    assert torch.equal(layout(torch.arange(3.0)), torch.zeros(3))
