"""The command line: help without extras, errors in one line, and the whole way by subprocess."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
from paths import ROOT
from typer.testing import CliRunner

from simplclip import cli

COMMAND = [sys.executable, "-m", "simplclip"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_help_needs_the_core_only():
    """With everything of the extras out of reach."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("open_clip", "timm", "torchvision", "webdataset", "yaml", "matplotlib",
                                      "tensorboard", "emoji", "resvg_py", "fontTools", "PIL", "braceexpand"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.argv[0] = "simplclip"
from simplclip.cli import app
app()
"""
    run = subprocess.run([sys.executable, "-c", code, "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(
        word in run.stdout
        for word in ["doctor", "data", "train", "evaluate", "teacher", "caption", "ablate", "plan", "export", "--version"]
    )
    run = subprocess.run([sys.executable, "-c", code, "train", "x.yaml"], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "simplclip: this command needs the package yaml: pip install 'simplclip[train]'"


def test_version():
    import simplclip

    result = call("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"simplclip {simplclip.__version__}"


@pytest.mark.parametrize("arguments", [["--version"], ["train", "missing.yaml"], ["missing"]])
def test_the_module_is_the_command(arguments, tmp_path):
    """`python -m simplclip` against what the console script of pyproject.toml calls: output, errors and exit code."""
    module, function = re.search(r'^simplclip = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).groups()
    script = f"import sys; from {module} import {function}; sys.argv[0] = 'simplclip'; {function}()"
    options = {"env": ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "capture_output": True, "text": True}
    as_script = subprocess.run([sys.executable, "-c", script, *arguments], **options)
    as_module = subprocess.run([*COMMAND, *arguments], **options)
    assert as_module.stdout + as_module.stderr
    assert as_module.stdout == as_script.stdout
    assert as_module.stderr.replace("python -m simplclip", "simplclip") == as_script.stderr
    assert as_module.returncode == as_script.returncode == (0 if arguments == ["--version"] else 2)


def test_torchrun_starts_the_module():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    run = subprocess.run([*torchrun, "-m", "simplclip", "--version"], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("simplclip ")


def test_help_config_prints_every_key():
    from simplclip.train import config

    result = call("train", "--help-config")
    assert result.exit_code == 0
    assert result.stdout.strip() == config.describe().strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "nothing.yaml"],
            "config: expected a YAML file or one of the built-in siclip-lite0-emoji, siclip-s0, siclip-tiny-emoji, got "
            "'nothing.yaml'",
        ),
        (["train", "siclip-tiny-emoji", "--set", "optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["train", "siclip-tiny-emoji", "--set", "optim.lr=x"], "optim.lr: expected a number, got 'x' (str)"),
        (["evaluate", "nothing.pt", "--data", "x.tar"], "checkpoint: no such file: nothing.pt"),
        (
            ["evaluate", "nothing.pt", "--data", "a=x.tar", "--data", "a=y.tar"],
            "--data: expected different split names (--data NAME=SHARDS), got 'a' twice",
        ),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"simplclip: {message}")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_names_and_paths_from_other_modules_too(tmp_path):
    config = tiny.write_config(tmp_path)
    for change, message in (
        (f"data.train={tmp_path}/no-*.tar", "matches none"),
        ("model.name=siclip-tony", "siclip-tiny"),
        ("run.device=cuda:77", "device: expected"),
        ("model.options.depth=3", "model.options"),
    ):
        result = call("train", config, "--set", change, "--set", f"run.out={tmp_path / change[:6]}")
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    from simplclip import evaluate

    def broken(*args, **kwargs):
        return json.loads("{")  # a ValueError, but none of ours

    monkeypatch.setattr(evaluate, "run", broken)
    result = call("evaluate", "x.pt", "--data", "x.tar")
    assert result.exit_code == 1
    assert isinstance(result.exception, json.JSONDecodeError)


def test_names_of_splits():
    names = cli._named_splits(
        [
            "concepts=a/b-*.tar",
            "data/emoji/vendor-*.tar",
            "x/val-{000..003}.tar",
            "z=/p/q=1/r.tar",
            "/p/q=1/held-000.tar",
            "one.tar.gz",
        ]
    )
    assert names == {
        "concepts": "a/b-*.tar",
        "vendor": "data/emoji/vendor-*.tar",
        "val": "x/val-{000..003}.tar",
        "z": "/p/q=1/r.tar",
        "held": "/p/q=1/held-000.tar",
        "one": "one.tar.gz",
    }


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0
    assert "similarity_loss" in result.output
    report = json.loads(call("doctor", "--json").stdout)
    assert "similarity_loss" in json.dumps(report)


@pytest.mark.slow
def test_ctrl_c_then_resume_then_evaluate(tmp_path):
    """In real processes, with a loader process that gets the Ctrl-C as well."""
    config = tiny.write_config(tmp_path)
    out = tmp_path / "run"
    changes = ["--set", "run.steps=400", "--set", "data.workers=1", "--set", "run.tensorboard=true"]
    process = subprocess.Popen(
        [*COMMAND, "train", config, *changes],
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step 3/") for line in lines)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT: finishing this step, then saving" in errors
    assert "Traceback" not in errors
    assert f"To go on: simplclip train {out / 'config.yaml'} --resume" in errors
    step = len((out / "metrics.csv").read_text().splitlines()) - 1
    assert 3 <= step < 400
    assert f"saved step {step} of 400" in errors

    resumed = subprocess.run(
        [*COMMAND, "train", str(out / "config.yaml"), "--set", f"run.steps={step + 2}", "--resume"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing from step {step}" in resumed.stdout
    assert f"done       step {step + 2}" in resumed.stdout
    assert len((out / "metrics.csv").read_text().splitlines()) == step + 3

    held = tiny.write_shard(tmp_path / "held-0.tar")
    result = call("evaluate", out, "--data", held, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "evaluation.json").read_text())["splits"]["held"]["images"] == 24
    assert (out / "evaluation-held.png").exists()
