"""The command line: help without extras, errors in one line, and a whole workflow by subprocess."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from unittest import mock

import pytest
from typer.main import get_command

import simplclip
from simplclip import evaluation
from simplclip.commands import options
from simplclip.commands.app import EXTRAS
from simplclip.commands.main import app
from simplclip.train import config
from support.data.pairs import png
from support.paths import ROOT
from support.programs import call
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
    files = files - {"__init__", "app", "machine", "main", "options"} | {"doctor", "selftest"}
    assert files == set(commands), "commands/main.py"
    group = commands.pop("data")
    for name, command in (commands | group.commands).items():
        assert command.epilog, f"the epilog of {name}"
        program, *words = shlex.split(command.epilog.removeprefix("Example: "))
        assert program == "simplclip"
        assert name in words[:2]
        command.make_context(name, words[words.index(name) + 1 :])


def test_each_extra_of_a_package_is_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        found = extras["optional-dependencies"][extra]
        assert any(package in line for line in found) or package == "open_clip_train"


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
            "train config.yaml --set inherit.source=[RN51/openai]",
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
    (tmp_path / "🙂").mkdir()
    (tmp_path / "🙂/1.txt").write_text("smile")
    (tmp_path / "🙂/1.png").write_bytes(png())
    words = f"{sys.executable} -m simplclip data pack 🙂 --out"
    for command, expected in (
        (f"{words} a | true", ""),
        (f"PYTHONIOENCODING=latin-1 {words} b 2>&-", r"\U0001f642"),
        (f"{words} c >&-", ""),
    ):
        done = subprocess.run(
            command, shell=True, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path
        )
        assert expected in done.stdout
        assert not done.stderr
    assert len([*tmp_path.glob("?/*-000000.tar")]) == 3


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0
    assert "ops by" in result.output
    assert "similarity_loss_fwd" in json.loads(call("doctor", "--json").stdout)["ops"]
