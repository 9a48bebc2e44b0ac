"""simplclip selftest: its calls; wrong kernels are found; what is taken out is not used."""

import collections
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from calls import DRAW, TERMS
from devices import needs_cpu_kernels
from interpreter import needs_interpreter
from paths import PYTHONPATH, ROOT, SUPPORT
from runs import go, rows
from typer.testing import CliRunner

import simplclip
from simplclip import ops, selftest
from simplclip.commands.doctor import render
from simplclip.commands.main import app
from simplclip.common import machine
from simplclip.ops import backends

KEY = "parallel_mlp cpu float32"


def spoiled(how, *of_selftest, **environment):
    """Runs `simplclip selftest` in a process with wrong kernels. how: as in spoiled.py."""
    environment = {**os.environ, "SPOIL": how, "PYTHONPATH": PYTHONPATH, "NO_COLOR": "1", **environment}
    command = [sys.executable, str(SUPPORT / "spoiled.py"), "selftest", "--device", "cpu", *of_selftest]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_is_tested_here():
    """Each op is tested on each backend that serves it, in each dtype; with --full compiled too."""
    found = collections.defaultdict(set)
    for row in selftest.rows_of("cpu", True, DRAW):
        found[row.op, row.backend].add(row.precision)
    kernels = {"float32", "bfloat16", "float16"}
    expected = {(op, "reference"): kernels | {"float64"} for op in DRAW} | {
        (op, selftest.COMPILED): {"float32"} for op in DRAW
    }
    expected |= {(op, "sdpa"): kernels for op in ("shaped_attention", "simplified_block")}
    if backends.extension is not None:
        expected |= {(op, "cpu"): kernels for op in DRAW}
    assert found == expected
    assert set(DRAW) == set(ops.__all__)


def test_the_quick_choice_has_every_option():
    seen = collections.defaultdict(set)
    for op in DRAW:
        for case in selftest.cases(selftest.Row(op, "reference", "float32"), "cpu", full=False):
            for name, value in case.call.options.items():
                plain = value if isinstance(value, (str, bool)) else type(value)
                seen[op, name] |= set(value) if name == "terms" else {plain}
            seen[op, "tensors"] |= set(case.call.tensors)
            seen[op, "all gradients"].add(case.need == case.call.needed())
    of_losses, of_blocks = (
        {name: seen[op, name] for of, name in seen if of == op} for op in ("similarity_loss", "simplified_block")
    )
    assert of_losses["terms"] == set(TERMS)
    assert of_losses["interactive"] == {"infonce", "kl"}
    assert of_losses["divergence"] == {"kl", "cross_entropy"}
    assert of_losses["positives"] == {"drop", "ids", "sum"}
    assert of_losses["symmetric"] == of_losses["decoupled"] == {True, False}
    assert of_losses.keys() >= {"weights", "label_smoothing", "prior", "margin", "scratch_bytes", "logit_scale"}
    assert of_losses["tensors"] >= {"logit_bias", "ids", "text_ids", "prior", "projected_image", "teacher_scale"}
    for op, name in (("parallel_mlp", "act"), ("simplified_block", "act")):
        assert seen[op, name] == {"gelu", "gelu_tanh", "quickgelu", "relu", "silu"}
    assert of_blocks["norm"] == {"layernorm", "rmsnorm"}
    assert of_blocks["causal"] == of_blocks["recompute"] == seen["shaped_attention", "causal"] == {True, False}
    assert of_blocks["tensors"] >= {"value_weight", "output_weight", "lengths", "norm_bias"}
    assert seen["feature_loss", "distance"] == {"mse", "smooth_l1"}
    assert seen["feature_loss", "normalize"] == {True, False}
    assert "projection" in seen["feature_loss", "tensors"]
    assert all(seen[op, "all gradients"] == {True, False} for op in DRAW)
    assert "lengths" in seen["shaped_attention", "tensors"]


@needs_cpu_kernels
@pytest.mark.slow
def test_a_flipped_sign_is_found_named_and_taken_out(cache, tmp_path):
    """One gradient is wrong in one dtype. Other dtypes, and the attention of the block that fails too, are not taken out."""
    done = spoiled("flipped_sign parallel_mlp simplified_block", "--json", str(tmp_path / "result.json"))
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("taken out")] == [f"taken out: {KEY}"]
    assert "parallel_mlp      cpu                FAILED" in done.stdout
    assert "parallel_mlp, cpu, float32: d_fc2_weight: error" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["passed"], list(result["taken_out"])) == (False, [KEY])
    assert result["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
    failed = {(row["op"], row["backend"], row["precision"]) for row in result["rows"] if row["failures"]}
    blocks = {("simplified_block", name, "float32") for name in ("cpu", "sdpa")}
    assert failed == {("parallel_mlp", "cpu", "float32"), *blocks}
    assert list(machine.known("failed", "cpu")) == [KEY]

    honest = spoiled("without_extras feature_loss")  # an op that is not tested stays out until --reset
    assert honest.returncode == 0, honest.stderr
    assert f"taken out by an earlier run: {KEY}" in honest.stdout
    machine.forget()
    assert list(machine.known("failed", "cpu")) == [KEY]
    back = CliRunner().invoke(app, ["selftest", "--device", "cpu", "--reset"])
    assert (back.exit_code, back.output) == (0, f"cpu: brought back: {KEY}\n")
    assert machine.known("failed", "cpu") == {}
    assert "nothing was taken out" in CliRunner().invoke(app, ["selftest", "--device", "cpu", "--reset"]).output


@needs_cpu_kernels
@pytest.mark.slow
def test_other_faults_are_found(cache):
    """A crash fails only its row; later rows run."""
    done = spoiled("one_fault_a_dtype feature_loss")
    assert done.returncode == 1, done.stderr
    for told in (
        "float32: d_student: run 20 of the same call gave other values",
        "bfloat16: student: it or the memory around it was changed",
        "float16: crashed with SIGSEGV",
    ):
        assert f"feature_loss, cpu, {told}" in done.stdout
    assert {f"feature_loss cpu {dtype}" for dtype in ("float32", "bfloat16", "float16")} == set(
        machine.known("failed", "cpu")
    )
    assert "feature_loss      reference            0.00" in done.stdout


@pytest.mark.slow
@needs_interpreter
def test_a_wrong_mask_of_a_triton_kernel_is_found(cache):
    done = spoiled("wrong_mask feature_loss", TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    assert "feature_loss, triton, float32: out: error" in done.stdout
    assert {key.split()[1] for key in machine.known("failed", "cpu")} == {"triton"}


@pytest.mark.prove
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_flipped_sign_in_the_built_library_is_found(cache, tmp_path):
    leave = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "simplclip"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "simplclip" / "kernels").symlink_to(tmp_path / "kernels")
    source = tmp_path / "csrc" / "cpu" / "feature" / "rows_impl.h"
    assert "g - u * along" in source.read_text()
    source.write_text(source.read_text().replace("g - u * along", "g + u * along"))
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env={**os.environ, "SIMPLCLIP_CUDA": "0"}, check=True, capture_output=True)
    done = spoiled("nothing feature_loss", PYTHONPATH=f"{tmp_path}{os.pathsep}{PYTHONPATH}")
    assert done.returncode == 1, done.stderr
    assert "feature_loss, cpu, float32: d_student: error" in done.stdout
    assert "taken out: feature_loss cpu float32" in done.stdout


def call():
    x = torch.ones(3, 4, requires_grad=True)
    weights = torch.ones(5, 4, requires_grad=True), torch.ones(2, 5, requires_grad=True)
    ops.parallel_mlp(x, weights[0], None, weights[1], None).sum().backward()
    return weights[1].grad


@pytest.fixture
def wrong_gradient(monkeypatch):
    function = backends.TABLE["parallel_mlp_bwd"]["cpu"].function
    wrong = backends.Implementation(lambda call: -function(call), backends.TABLE["parallel_mlp_bwd"]["cpu"].why_not)
    monkeypatch.setitem(backends.TABLE["parallel_mlp_bwd"], "cpu", wrong)


@needs_cpu_kernels
def test_the_next_backend_serves_for_what_is_taken_out(cache, wrong_gradient):
    """The next backend serves forward and backward in one dtype; forcing the failed one raises; doctor says why."""
    before = call()
    machine.store("failed", "cpu", {KEY: "a reason", "parallel_mlp reference float32": "never"})
    torch.testing.assert_close(call(), -before)
    chosen = {(op, dtype): backends.select(op, "cpu", dtype)[0] for op in ("parallel_mlp_fwd", "parallel_mlp_bwd")
              for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    assert {dtype for (_, dtype), name in chosen.items() if name == "reference"} == {torch.float32}
    assert set(chosen.values()) == {"cpu", "reference"}
    why = "failed simplclip selftest on this machine (a reason); simplclip selftest --reset brings it back"
    with (
        simplclip.backend("cpu"),
        pytest.raises(RuntimeError, match="cannot serve parallel_mlp_fwd: failed simplclip selftest"),
    ):
        call()
    report = simplclip.report()
    assert report["ops"]["parallel_mlp_bwd"]["cpu"]["others"]["cpu"] == why
    assert report["ops"]["feature_loss_bwd"]["cpu"]["backend"] == "cpu"
    assert f"taken out    {KEY}: a reason" in render(report).splitlines()
    with backends.with_taken_out({}):
        torch.testing.assert_close(call(), before)
    machine.store("failed", "cpu", {})
    torch.testing.assert_close(call(), before)
    for line in ("simplclip selftest", "simplclip tune", "python -m benchmarks.gpu"):
        assert line in render(report)


@needs_cpu_kernels
@pytest.mark.slow
def test_training_is_right_without_what_is_taken_out(cache, tmp_path, request):
    """Training is right, and warns once of the backend that it does without."""

    def losses(name):
        text = go(tiny.settings(tmp_path, "run.steps=3", f"run.out={tmp_path / name}"))
        return [float(row["loss"]) for row in rows(tmp_path / name)], text

    right, text = losses("right")
    assert "selftest" not in text
    request.getfixturevalue("wrong_gradient")
    wrong, _ = losses("wrong")
    assert wrong[1:] != pytest.approx(right[1:], rel=1e-4)
    machine.store("failed", "cpu", {KEY: "a reason"})
    without, text = losses("without")
    assert without == pytest.approx(right, rel=1e-5)
    assert (
        text.count(f"warning    {KEY} failed simplclip selftest on this machine (a reason); simplclip selftest --reset") == 1
    )
    assert "parallel_mlp_fwd by reference" in text


def test_what_the_command_prints_writes_and_stores(cache, tmp_path, monkeypatch):
    failure = selftest.Failure("d_q: error \x1b[2J 3", "shaped_attention: q [1, 2]", ["shaped_attention sdpa float16"])
    found = [selftest.Row("shaped_attention", "sdpa", "float16", 5, 1e9, [failure])]
    found += [selftest.Row("shaped_attention", "sdpa", "float32", 5, 0.125)]
    monkeypatch.setattr(selftest, "survey", lambda device, *, full: iter(found if full else found[1:]))
    arguments = ["selftest", "--device", "cpu", "--json", str(tmp_path / "a.json")]
    right = CliRunner().invoke(app, arguments)
    assert right.exit_code == 0, right.output
    assert "shaped_attention  sdpa                 0.12" in right.stdout
    assert "5 calls in 0 s: all are right" in right.stdout
    assert json.loads((tmp_path / "a.json").read_text())["passed"]
    assert not cache.exists()
    wrong = CliRunner().invoke(app, [*arguments, "--full"])
    assert wrong.exit_code == 1
    assert "shaped_attention, sdpa, float16: d_q: error \\x1b[2J 3\n    shaped_attention: q [1, 2]\n" in wrong.stdout
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["rows"][0]["failures"][0]["call"] == "shaped_attention: q [1, 2]"
    assert list(written["taken_out"]) == list(machine.known("failed", "cpu")) == ["shaped_attention sdpa float16"]
    monkeypatch.setenv("SIMPLCLIP_CACHE", str(tmp_path / "a.json"))  # a file in place of a folder
    machine.forget()
    again = CliRunner().invoke(app, [*arguments, "--full"])
    assert again.exit_code == 2
    assert re.match("simplclip: .*: expected to write .*, got File exists; SIMPLCLIP_CACHE", again.stderr)


def test_a_forced_backend_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(backends, "_forced", "sdpa")  # sets what SIMPLCLIP_BACKEND sets
    row = selftest.prove(selftest.Row("feature_loss", "reference", "float32"), "cpu", full=False)
    assert (row.calls, row.failures) == (14, [])
    assert backends.forced() == "sdpa"


@pytest.mark.parametrize("command", ["selftest", "tune"])
def test_devices(command):
    result = CliRunner().invoke(app, [command, "--device", "cuda:0"])
    assert result.exit_code == 2
    assert result.stderr.startswith("simplclip: --device: expected cuda, cpu or auto, got ")


def test_what_is_blamed():
    """A wrong attention explains a wrong block; a loss's terms, in float32, do not explain failures in its other dtypes."""
    failure = lambda *ran: [selftest.Failure(f"{ran[0]} is\n wrong", ran=list(ran))]  # noqa: E731
    rows_failed = [
        selftest.Row("simplified_block", "triton", "bfloat16", failures=failure("a triton bfloat16", "m triton bfloat16")),
        selftest.Row("parallel_mlp", "triton", "bfloat16", failures=failure("m triton bfloat16")),
        selftest.Row("similarity_loss", "triton", "float32", failures=failure("s triton float32", "t triton float32")),
        selftest.Row("similarity_loss", "triton", "bfloat16", failures=failure("s triton bfloat16", "t triton float32")),
        selftest.Row("simplified_block", "sdpa", "float16", failures=failure("m cpu float16", "a sdpa float16")),
        selftest.Row("feature_loss", "reference", "float32", failures=[selftest.Failure("wrong")]),
    ]
    found = selftest.taken_out(rows_failed)
    assert set(found) == {
        "m triton bfloat16",
        "a sdpa float16",
        *(f"s triton {d}" for d in ("float32", "bfloat16")),
        "t triton float32",
    }
    assert found["m triton bfloat16"] == "m triton bfloat16 is wrong"


def test_guards_see_what_is_written_beside_and_into_a_tensor():
    for number in range(20):
        guarded = selftest.Guarded(random.Random(number))
        inside, beside = torch.rand(3, 5), torch.rand(3, 5)
        views = [guarded("inside", inside), guarded("beside", beside), guarded("ids", torch.arange(4))]
        assert torch.equal(views[0], inside)
        assert guarded.changed() == []
        views[0][1, 2] = -0.0
        views[1].as_strided((1,), (1,), views[1].storage_offset() + views[1].stride(0) * 2 + 5).zero_()
        assert guarded.changed() == ["inside", "beside"]
