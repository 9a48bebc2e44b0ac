"""simplclip selftest: every op is checked; wrong kernels are found and named with the variable that
avoids them.
"""

import importlib
import json
import re

import pytest
import torch
from torch.utils._pytree import tree_map

import simplclip
from simplclip import ops, selftest
from simplclip.ops import backends, registry
from support.devices import needs_cpu_kernels
from support.programs import call, one_line

CPU = torch.device("cpu")


def test_every_op_is_checked():
    assert set(selftest.CALLS) == set(ops.__all__)


@pytest.mark.parametrize("op", selftest.CALLS)
def test_each_backend_that_serves_is_checked(op, monkeypatch):
    monkeypatch.setattr(selftest, "check", lambda *_: None)
    served = {(row.backend, row.dtype) for row in selftest.check_ops(CPU, [op])}
    expected = {(selftest.COMPILED, torch.float32)}
    for name in {"reference", *backends.NAMES}:
        for dtype in selftest.DTYPES:
            row = selftest.Row(op, name, dtype)
            serves = any(row.serves(make(), CPU) for make in selftest.CALLS[op])
            if name == "reference" or serves:
                expected.add((name, dtype))
    assert served == expected


@pytest.fixture
def spoil(monkeypatch):
    """Yields a function that replaces a backend's function of an op by wrong(function, call)."""
    calls = {"shaped_attention": selftest.CALLS["shaped_attention"][:2]}
    monkeypatch.setattr(selftest, "CALLS", calls)
    registry.forget_calls()

    def replace(op, backend, wrong):
        served = importlib.import_module(backends.TABLE["shaped_attention"][backend].module)
        right = getattr(served, op)
        monkeypatch.setattr(served, op, lambda call: wrong(right, call))

    yield replace
    registry.forget_calls()  # which keep the replaced functions


def run(*arguments):
    return call("selftest", "--device", "cpu", *arguments)


@needs_cpu_kernels
def test_a_flipped_sign_is_found_and_named(spoil, tmp_path):
    """The gradients of one backend are wrong in one dtype."""

    def flipped(function, call):
        return tree_map(lambda t: -t if call.q.dtype == torch.float16 else t, function(call))

    spoil("shaped_attention_bwd", "cpu", flipped)
    done = run("--json", tmp_path / "result.json")
    assert done.exit_code == 1, done.output
    assert re.search(r"\nshaped_attention, cpu, float16:\n    d_\w+: error", done.output)
    assert "\n    SIMPLCLIP_BACKEND=shaped_attention=reference avoids it\n" in done.output
    result = json.loads((tmp_path / "result.json").read_text())
    (failed,) = [row for row in result["rows"] if row["failures"]]
    assert (failed["op"], failed["backend"], failed["dtype"]) == (
        "shaped_attention",
        "cpu",
        "float16",
    )
    assert not result["passed"]
    assert result["environment"]["simplclip"] == simplclip.__version__
    for forced, right in ({}, False), ({"shaped_attention": "reference"}, True):
        # on the backend that comes first, or is forced
        row = selftest.Row("shaped_attention", "", torch.float16)
        with simplclip.backend(**forced):
            selftest.check(row, selftest.CALLS["shaped_attention"][0](), CPU)
        assert (not row.failures) == right


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # results are not written
        (lambda function, call: tree_map(torch.empty_like, function(call)), "out: error nan"),
        (lambda function, call: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_other_faults_are_found(spoil, wrong, message):
    spoil("shaped_attention_fwd", "cpu", wrong)
    done = run()
    assert done.exit_code == 1
    assert done.output.count(f", cpu, float32:\n    {message}") == 1
    assert "shaped_attention  reference      float32       2    0.00\n" in done.output


@needs_cpu_kernels
def test_reading_between_rows_is_found(spoil):
    """A kernel that takes tensors for contiguous reads NaN."""

    def reads_on(function, call):
        dense = call.q.as_strided(call.q.shape, torch.empty(call.q.shape, device="meta").stride())
        return tree_map(lambda t: t + 0 * dense.sum(), function(call))

    spoil("shaped_attention_fwd", "cpu", reads_on)
    assert "\nshaped_attention, cpu, float32:\n    out: error nan" in run().output


def test_all_are_right(spoil):
    done = run()
    assert done.exit_code == 0, done.output
    assert "all are right" in done.output


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path):
    for file in (tmp_path, tmp_path / "none/report.json"):
        line = one_line("selftest", "--device", "cpu", "--json", file)
        assert line.startswith("simplclip: --json: expected a file in a folder that can be written")


def test_devices():
    result = call("selftest", "--device", "cuda:0")
    assert result.exit_code == 2
    assert "Invalid value for '--device'" in result.stderr
