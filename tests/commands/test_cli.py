"""The command line: help without extras, errors in one line, and a whole workflow by subprocess."""

import ast
import ctypes
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from typer.main import get_command

import simplclip
from simplclip import evaluation
from simplclip.commands import options
from simplclip.commands.app import extra_of
from simplclip.commands.main import app
from simplclip.models.naming import NAMES
from simplclip.models.trained import read_checkpoint
from simplclip.train import config
from support.data.pairs import png
from support.paths import ROOT
from support.programs import call, one_line
from support.train import tiny

pytestmark = pytest.mark.long


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "PYTHONPATH": str(ROOT),
}


def process(*words, **options):
    """Runs Python in a process of its own. words: the arguments behind "python"."""
    pipes = {"env": ENVIRONMENT, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], **pipes, **options)


WITHOUT_EXTRAS = """
import json
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("open_clip", "timm", "torchvision", "webdataset", "yaml",
                                      "matplotlib", "emoji", "resvg_py", "PIL", "simplejpeg"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from typer.testing import CliRunner
from simplclip.commands.main import app
calls = (["--help"], ["train", "x.yaml"], ["train", "--help-config"])
results = [CliRunner().invoke(app, words) for words in calls]
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""


def test_help_needs_the_core_only():
    """Other commands name the extra that they need."""
    done = process("-c", WITHOUT_EXTRAS)
    assert done.returncode == 0, done.stderr
    (code, text, _), *others = json.loads(done.stdout)
    assert code == 0
    for word in (*get_command(app).commands, "--version"):
        assert word in text
    for code, text, error in others:
        assert (code, text, error.count("\n")) == (2, "", 1)
        assert error.startswith("simplclip: this command needs the package yaml: pip install ")


def test_the_module_and_the_script_are_the_command():
    module, function = re.search(
        r'^simplclip = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).groups()
    assert getattr(importlib.import_module(module), function) is app
    run, result = process("-m", "simplclip", "train", "missing.yaml"), call("train", "missing.yaml")
    assert (run.returncode, run.stdout, run.stderr) == (2, result.stdout, result.stderr)
    assert call("--version").stdout == f"simplclip {simplclip.__version__}\n"


def test_each_file_of_a_command_is_one():
    """Its line in commands/main.py is not forgotten, and its example can be parsed."""
    files = {path.stem for path in (ROOT / "simplclip/commands").glob("*.py")}
    commands = get_command(app).commands
    assert files - {"__init__", "app", "main", "options"} == set(commands), "commands/main.py"
    group = commands.pop("data")
    for name, command in (commands | group.commands).items():
        assert command.epilog, f"the epilog of {name}"
        program, *words = shlex.split(command.epilog.removeprefix("Example: "))
        assert program == "simplclip"
        assert name in words[:2]
        command.make_context(name, words[words.index(name) + 1 :])


def test_an_extra_installs_each_module_that_is_imported():
    imported = set()
    for path in (ROOT / "simplclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    modules = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert len(modules) > 20
    modules -= {"simplclip", "torch", "typer", "rich", "lazy_loader"}
    modules -= {"typing_extensions", "xformers"}  # with torch; what no command needs
    assert [name for name in modules if extra_of(name) is None] == []


def test_help_config_prints_every_key():
    result = call("train", "--help-config")
    assert result.exit_code == 0
    assert result.stdout.strip() == config.describe().strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nothing.yaml", "config: expected a YAML file or one of the built-in siclip"),
        ("train config.yml", "got 'config.yml'; did you mean config.yaml?"),
        ("train siclip-so", "got 'siclip-so'; did you mean siclip-s0?"),
        ("train config.yaml --set optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("train config.yaml --lr 1", "--lr: unknown option; did you mean --set optim.lr=VALUE?"),
        ("evaluate x.pt --num-workers 3", "did you mean --workers?"),
        ("evaluate x.pt --lr 3", "--lr: unknown option; root evaluate --help lists all"),
        ("train config.yaml --set data.train=no-*.tar", "matches none"),
        (
            "evaluate nothing.pt --data data/train-0.tar",
            "checkpoint: expected a file of weights, got no such file: nothing.pt",
        ),
        (
            "train config.yaml --set model.checkpoint=gone.pt",
            "model.checkpoint: expected a file of weights, got no such file: gone.pt",
        ),
        (
            "train config.yaml --set inherit.source=[minilm,RN51/openai]",
            "expected a file of weights, got no such file: RN51/openai",
        ),
        (
            "evaluate config.yaml --data a=x.tar --data a=y.tar",
            "--data: expected different split names (--data NAME=DATA)",
        ),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, arguments, message):
    tiny.write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = call(*arguments.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("simplclip: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "data"]


WITHOUT_TORCH = """if True:
    import json
    import sys
    from typer.testing import CliRunner
    from simplclip.commands.main import app
    from simplclip.commands.train import check_sources
    from simplclip.train import config
    there = ["data/train-0.tar", {"shards": "t.csv", "weight": 2}, "pipe:cat x", "."]
    check_sources(config.from_dict({"data": {"train": there}, "run": {"out": "run"}}))
    for command in json.load(sys.stdin):
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 2, (command, result.output)
        print(result.stderr.strip())
        assert "torch" not in sys.modules, command
"""


def test_names_are_checked_without_torch_before_anything_is_written(tmp_path):
    tiny.write_config(tmp_path)
    for file in ("begun/metrics.csv", "done/export.json", "t.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    train = "train config.yaml --set data.train=t.csv --set"
    lines = {
        f"{train} data.train=gone/*.tar": "data.train: expected files, got 'gone/*.tar', which ",
        f"{train} data.train=[t.csv,gone.csv]": "data.train: expected a file, got 'gone.csv', ",
        f"{train} data.sidecars=[gone]": "data.sidecars: expected a folder, got 'gone', which ",
        f"{train} eval.every=1 --set eval.splits.held=gone.tar": "eval.splits.held: expected ",
        f"{train} model.name=ViT-B-32": f"model.name: expected one of {[*NAMES]} or "
        "open_clip:NAME, got 'ViT-B-32'; nearest: ['open_clip:ViT-B-32']",
        f"{train} run.device=cdua": "run.device: expected auto, cpu, cuda or "
        "cuda:N, got 'cdua' (str)",
        f"{train} run.out=begun": "run.out: expected a folder without a run, got begun; ",
        "plan siclip-s0 --card 24": "--card: expected one of rtx-3060, ",
        "plan siclip-s0 --card 6090": "--card: expected one of rtx-3060, ",
        "plan config.yaml --card 3090 --set model.name=siclip": "model.name: expected one of [",
        "plan open_clip:RN51 --card 3090": "model.name: expected one of [",
    }
    done = process("-c", WITHOUT_TORCH, input=json.dumps([*lines]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said, line in zip(done.stdout.splitlines(), lines.values(), strict=True):
        assert said.startswith(f"simplclip: {line}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "data", "begun", "done", "t.csv"}


def test_a_machine_without_a_gpu_says_so_before_it_packs(tmp_path, monkeypatch):
    missing = OSError("libcuda.so.1: cannot open shared object file")
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=missing))
    changes = ("--set", "run.device=cuda:1", "--set", f"data.train={tmp_path}")
    assert one_line("train", tiny.write_config(tmp_path), *changes) == (
        "simplclip: run.device: expected a device of this machine, got 'cuda:1'; it has no driver "
        "of a GPU"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_moved_goes_on_where_it_lies(tmp_path, monkeypatch):
    """With the shards that it packed; --set run.out= names another place."""

    def run(file, *changes):
        return call("train", file, "--resume", *(f"--set={change}" for change in changes))

    tiny.write_config(tmp_path)
    (tmp_path / "pairs").mkdir()
    for number in range(24):
        (tmp_path / f"pairs/{number}.png").write_bytes(png(number))
        (tmp_path / f"pairs/{number}.txt").write_text(f"number {number}")
    monkeypatch.chdir(tmp_path)
    assert run("config.yaml", "data.train=pairs", "run.steps=1", "run.out=runs/old").exit_code == 0
    Path("runs/old").rename("new")
    shutil.rmtree("pairs")
    moved = (
        "run        in new, where new/config.yaml lies; --set run.out=runs/old means its former "
        "place"
    )
    result = run("new/config.yaml", "run.steps=2")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(moved)
    assert "continuing from step 1" in result.output
    assert read_checkpoint("new")["step"] == 2
    assert not Path("runs/old").exists()
    assert config.load("new/config.yaml").run.out == "new"
    assert moved not in run("new/config.yaml", "run.steps=2").output
    Path("new").rename("newer")
    result = call("train", "newer/config.yaml")
    assert "run.out: expected a folder without a run, got newer" in result.output
    result = run("newer/config.yaml", "data.train=data/train-0.tar", "run.out=other")
    assert "other has no checkpoint yet: starting at step 0" in result.output
    assert read_checkpoint("newer")["step"] == 2


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        return json.loads("{")  # a ValueError that is not a UserError

    monkeypatch.setattr(evaluation, "evaluate", broken)
    (tmp_path / "x.tar").touch()
    result = call("evaluate", tmp_path / "x.tar", "--data", tmp_path / "x.tar")
    assert result.exit_code == 1
    assert isinstance(result.exception, json.JSONDecodeError)


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, monkeypatch):
    """torch raises ImportError if it is imported again after that."""
    attempts = mock.Mock(side_effect=[KeyboardInterrupt, ImportError("only once per process")])
    for name in simplclip.train.__all__:
        monkeypatch.delitem(vars(simplclip.train), name, raising=False)
    monkeypatch.setattr(simplclip.train, "__getattr__", attempts)
    result = call("train", tiny.write_config(tmp_path))
    assert (result.exit_code, result.output.strip()) == (130, "simplclip: interrupted")


def test_names_of_splits():
    named = {"concepts": "a/b-*.tar", "z": "/p/q=1/r.tar"}
    named |= {"Prüfung, 第 2 部 🙂": "x=1.tar", "COCO (5k)": "coco.json#test"}
    derived = {
        "vendor": "emoji/vendor-*.tar",
        "val": "val-{000..003}.tar",
        "held": "/q=1/held-000.tar",
        "one": "one.tar.gz",
        "photos": "set #1 [x]/photos",
        "far": "pipe:curl --retry=3 https://host/far-1.tar",
        "データ": "データ-1.tar",
        "dataset_coco": "x/dataset_coco.json",
        "flickr-val": "flickr.json#val",
        "small4": "x/small4",
        "coco2017": "coco2017.json",
        "v-1": "v-1-000.tar",
        "00000": "00000.tar",
    }
    words = [*(f"{name}={shards}" for name, shards in named.items()), *derived.values()]
    assert options.named_splits(words) == named | derived


def test_outputs_that_end_early_or_lack_characters(tmp_path):
    """`| head` has read enough, latin-1 has no emoji, a daemon no stderr; none costs a result."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.txt").write_text("🙂")
    (tmp_path / "in/1.png").write_bytes(png())
    words = f"{sys.executable} -m simplclip data pack in --out"
    for command, expected in (
        (f"{words} a | true", ""),
        (f"PYTHONIOENCODING=latin-1 {words} b 2>&-", r"in/1: \U0001f642"),
        (f"{words} c >&-", ""),
    ):
        done = subprocess.run(
            command, shell=True, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path
        )
        assert expected in done.stdout
        assert not done.stderr
    assert len([*tmp_path.glob("?/in-000000.tar")]) == 3


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0
    assert "ops by" in result.output
    assert "similarity_loss_fwd" in json.loads(call("doctor", "--json").stdout)["ops"]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGINT", pytest.param("closed pipe", marks=pytest.mark.prove)])
def test_a_run_that_is_ended_saves_its_state_and_goes_on(tmp_path, end):
    """In a real process, with a loader process that gets the signal as well."""
    source, out = tiny.write_config(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "simplclip", "train", source]
    command += ["--set", "run.steps=4000", "--set", "data.workers=1"]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    deadline = time.monotonic() + 300
    metrics = out / "metrics.csv"
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT) if end == "SIGINT" else run.stdout.close()
        errors = run.stderr.read()
        assert run.wait(300) == 130, errors
    finally:
        run.kill()
    assert "Traceback" not in errors
    step = len(metrics.read_text().splitlines()) - 1
    assert 3 <= step < 4000
    assert f"{end}: saved step {step} of 4000" in errors
    assert read_checkpoint(out)["step"] == step
    assert end != "SIGINT" or "SIGINT: finishing this step, then saving" in errors
    assert f"To go on: simplclip train {out / 'config.yaml'} --resume" in errors
    changes = ("--set", f"run.steps={step + 1}", "--set", "data.workers=0")
    resumed = call("train", out / "config.yaml", *changes, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert f"continuing from step {step}" in resumed.output
    assert f"done       step {step + 1}" in resumed.output
    assert len(metrics.read_text().splitlines()) == step + 2
