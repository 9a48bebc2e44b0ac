"""The ablation: what each variant is told, that it goes on after a stop, its table and picture, and its refusals."""

import csv
import json
import types
from unittest import mock

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from simplclip import ablate, cli, models
from simplclip.train import config
from simplclip.train.config import ConfigError

PARTS = ["loss.feature_weight=2", "loss.relational_weight=1", "loss.interactive_weight=1", "data.captions_per_image=2"]


@pytest.fixture
def source(tmp_path):
    """A config with every part on, that inherits from a checkpoint of the same model."""
    torch.save(models.create("siclip-tiny", **tiny.MODEL).state_dict(), tmp_path / "weights.pt")
    held = tiny.write_shard(tmp_path / "held" / "held-0.tar")
    changes = [*PARTS, "run.steps=1", f"inherit.source={tmp_path / 'weights.pt'}", f"eval.splits.held={held}"]
    (tmp_path / "full.yaml").write_text(tiny.settings(tmp_path, *changes, teacher=256).to_yaml())
    return str(tmp_path / "full.yaml")


@pytest.fixture
def in_process(monkeypatch):
    """Runs the commands of an ablation here instead of in processes of their own; gives what was called."""
    called = []

    def run(command, env, stdout, stderr):
        called.append(command[3:])
        result = CliRunner().invoke(cli.app, command[3:])
        stdout.write(result.output)
        return types.SimpleNamespace(returncode=result.exit_code)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    return called


@pytest.mark.slow
def test_every_variant_is_trained_and_counted_once(source, tmp_path, in_process, monkeypatch):
    out, original = tmp_path / "ablation", ablate.subprocess.run

    def stop(*args, **kwargs):
        if len(in_process) == 15:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ablate.subprocess, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            ablate.run(source, out, seeds=1)
    assert not (out / "ablation.csv").exists()
    table = ablate.run(source, out, seeds=1)
    trained = [c for c in in_process if c[0] == "train"]
    assert len(trained) == 12 + 1, "one run was between its training and its evaluation"

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 2
    assert [row["variant"] for row in rows[::2]] == 2 * list(ablate.VARIANTS)
    assert {row["start"] for row in rows} == {"scratch", "inherited"}
    first = json.loads((out / "scratch-0-0" / "evaluation.json").read_text())["splits"]["held"]["image_to_text"]["R@1"]
    assert float(rows[0]["R@1"]) == pytest.approx(first["value"], abs=1e-6)
    assert float(rows[0]["chance of R@1"]) == pytest.approx(first["chance"], abs=1e-6)
    assert Image.open(out / "ablation.png").size[0] > 600

    def settings(name):
        c = config.load(out / name / "config.yaml")
        weights = [w.removesuffix("_loss") for w in c.loss.weights]
        return weights, c.data.captions_per_image, c.inherit.source is not None

    every = ["contrastive", "distill", "interactive", "feature", "pair_matching"]
    assert settings("scratch-0-0") == (["contrastive"], 1, False)
    assert settings("inherited-1-0") == (["contrastive", "pair_matching"], 1, True)
    assert settings("inherited-2-0") == (["contrastive", "feature", "pair_matching"], 1, True)
    assert settings("scratch-3-0") == (["contrastive", "distill", "feature", "pair_matching"], 1, False)
    assert settings("scratch-4-0") == (every, 1, False)
    assert settings("inherited-5-0") == (every, 2, True)

    before = len(in_process)
    ablate.run(source, out, seeds=1)
    assert len(in_process) == before, "nothing is left to do"
    with pytest.raises(ConfigError, match="expected the settings of the ablation in .*, got others: run.steps was 1, now 2"):
        ablate.run(source, out, overrides=["run.steps=2"], seeds=1)


def test_a_run_that_fails_names_its_log(source, tmp_path, in_process):
    with pytest.raises(RuntimeError, match=r"the run 'contrastive', scratch, seed 0 ended with 2: see .*scratch-0-0.log"):
        ablate.run(source, tmp_path / "a", overrides=["run.device=cuda:77"], seeds=1)
    assert "device: expected" in (tmp_path / "a" / "scratch-0-0.log").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.relational_weight=0", "expected every part to be enabled, got a config without: loss.relational_weight"),
        ("data.captions_per_image=1", "got a config without: data.captions_per_image"),
        ("inherit.source=null", "inherit.source: expected weights to inherit from, got null"),
        ("eval.splits={}", "eval.splits: expected held-out data, got none"),
    ],
)
def test_what_it_refuses(source, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        ablate.run(source, tmp_path / "a", overrides=[change])
    assert not (tmp_path / "a").exists()


def test_a_folder_with_other_things_is_left_alone(source, tmp_path):
    with pytest.raises(ConfigError, match="out: expected a new or empty folder or that of an ablation"):
        ablate.run(source, tmp_path / "held")
    result = CliRunner().invoke(cli.app, ["ablate", source, "--out", str(tmp_path / "a"), "--start", "middle"])
    assert result.exit_code == 2
    assert result.stderr == "simplclip: starts: expected some of scratch, inherited, got ['middle']\n"


def test_commands_run_in_processes_with_their_share_of_threads(source, tmp_path, monkeypatch):
    failing = mock.Mock(return_value=types.SimpleNamespace(returncode=1))
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(ablate.subprocess, "run", failing)
    with pytest.raises(RuntimeError):
        ablate.run(source, tmp_path / "a", jobs=2, seeds=1)
    command, environment = failing.call_args_list[0].args[0], failing.call_args_list[0].kwargs["env"]
    assert command[1:4] == ["-m", "simplclip", "train"]
    assert environment["OMP_NUM_THREADS"] == environment["SIMPLCLIP_THREADS"] == "2"
