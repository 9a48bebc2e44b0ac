"""The ablation: order of the runs, stopping and going on, failures, tables and the picture."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import pytest
import tiny
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from benchmarks.ablation import __main__ as command
from benchmarks.ablation import run as ablation
from benchmarks.ablation import tables, worker
from simplclip.commands.main import app
from simplclip.common.files import locked, write_atomically
from simplclip.train import config
from simplclip.train.config import ConfigError

TEXT = """
effects:
  - {name: pm, group: matching, base: [loss.pm_weight=0], variant: []}
  - {name: rate, group: optimizer, base: [], variant: [optim.lr=1e-4], seeds: 1}
  - {name: decay, group: optimizer, base: [], variant: [optim.weight_decay=0]}
"""


@pytest.fixture
def source(tmp_path):
    held = tiny.write_shard(tmp_path / "held" / "held-0.tar")
    settings = tiny.settings(tmp_path, "run.steps=1", f"eval.splits={{a: {held}, b: {held}}}")
    (tmp_path / "full.yaml").write_text(settings.to_yaml())
    return str(tmp_path / "full.yaml")


@pytest.fixture
def effects(tmp_path):
    path = tmp_path / "effects.yaml"
    path.write_text(TEXT)
    return path


def made_up(recall, steps=1, seconds=0.5):
    """Returns a result: image to text has `recall` in split a and half of it in b; text to image has 0.2 more."""
    figure = lambda value: {f"R@{k}": {"value": value, "chance": k / 24} for k in (1, 5, 10)}  # noqa: E731
    both = lambda value: {  # noqa: E731
        "image_to_text": figure(value), "text_to_image": figure(value + 0.2), "AUC": 0.9 + value / 10,
    }  # fmt: skip
    splits = {"a": both(recall), "b": both(recall / 2)}
    return {"step": steps, "seconds_per_step": seconds, "parameters": 10, "splits": splits}


@pytest.fixture
def pretended(monkeypatch):
    """Replaces training by made-up results; yields the names of the runs in order."""
    names = []

    def train(trial, source, out, threads, running):
        folder = trial.folder(out)
        folder.mkdir(exist_ok=True)
        names.append(re.sub(r"-\w{10}$", "", folder.name))
        recall = (int(trial.digest, 16) % 50) / 100 + 0.01 * trial.seed
        write_atomically(folder / worker.RESULT, json.dumps(made_up(recall)))  # as the worker does; another thread reads it
        if trial.keep:
            (folder / "last.pt").touch()

    monkeypatch.setattr(ablation, "_train", train)
    return names


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_effect_by_effect_with_all_seeds_and_each_run_once(source, effects, tmp_path, pretended):
    table = ablation.run(source, effects, tmp_path / "out", seeds=2)
    assert pretended == [
        *("pm-base-s0", "pm-variant-s0", "pm-base-s1", "pm-variant-s1"),
        *("rate-variant-s0", "decay-variant-s0", "decay-variant-s1"),
    ]
    kinds = (("R@1", "all"), ("R@1", "a"), ("R@1", "b"), ("AUC", "all"))
    assert [(row["effect"], row["measure"], row["split"], row["seeds"]) for row in rows(table)] == [
        (effect, *kind, seeds) for effect, seeds in (("pm", "2"), ("rate", "1"), ("decay", "2")) for kind in kinds
    ]
    assert len(rows(tmp_path / "out" / "ablation.csv")) == 7 * 2 * 2
    assert Image.open(tmp_path / "out" / "effects.png").size[0] > 1000

    effects.write_text(TEXT.replace("name: decay", "name: no decay") + "  - {name: new, group: g, variant: [optim.lr=0.1]}")
    ablation.run(source, effects, tmp_path / "out", seeds=3, only=["optimizer", "ne?"])
    assert pretended[7:] == ["no-decay-base-s2", "no-decay-variant-s2", "new-variant-s0", "new-variant-s1", "new-variant-s2"]


@pytest.mark.slow
def test_it_goes_on_where_it_was(source, effects, tmp_path, pretended, monkeypatch):
    original = ablation._train

    def stop(trial, *rest):
        if len(pretended) == 3:
            raise KeyboardInterrupt
        return original(trial, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            ablation.run(source, effects, tmp_path / "out", seeds=2)
    assert [(row["effect"], row["seeds"]) for row in rows(tmp_path / "out" / "effects.csv")][::4] == [("pm", "1")]
    ablation.run(source, effects, tmp_path / "out", seeds=2)
    assert len(pretended) == len(set(pretended)) == 7


def test_the_command(source, effects, tmp_path, pretended, capsys):
    """A report trains nothing and needs no lock; a second process that would train is refused."""
    out = tmp_path / "out"
    arguments = [source, "--effects", str(effects), "--out", str(out), "--seeds", "1", "--set", "run.log_every=2"]
    command.main([*arguments, "--only", "pm"])
    (out / "effects.csv").unlink()
    with locked(out, "busy"):
        command.main([*arguments, "--report"])
        assert {row["effect"] for row in rows(out / "effects.csv")} == {"pm"}
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"got {out}: another ablation runs in it\n")
    assert len(pretended) == 2


PREPARED = """
prepare: {own: [optim.lr=0.5, run.seed=0]}
effects:
  - {name: plain, group: g, base: [], variant: [optim.lr=0.5]}
  - {name: warm, group: g, base: [], variant: ["inherit.source='{own}'"]}
"""


def test_prepared_runs_are_done_first_and_keep_their_checkpoint(source, effects, tmp_path, pretended, monkeypatch):
    effects.write_text(PREPARED)
    out = tmp_path / "out"
    ablation.run(source, effects, out, seeds=1, only=["plain"])
    assert pretended == ["plain-base-s0", "plain-variant-s0"]
    ablation.run(source, effects, out, seeds=2, jobs=2)
    assert "plain-variant-s0" in pretended[2:4], "it was done, but its checkpoint is needed now"  # two runs at a time
    others = ["plain-base-s1", "plain-variant-s1", "warm-variant-s0", "warm-variant-s1"]
    assert sorted(pretended[2:]) == sorted(["plain-variant-s0", *others])

    monkeypatch.setattr(ablation, "_train", lambda trial, *rest: "failed" if trial.keep else None)
    told = r"2 runs failed.*\nfailed\nwarm-variant-s0-\w+ was not started: the run of own failed$"
    with pytest.raises(ablation.AblationError, match=told):
        ablation.run(source, effects, tmp_path / "other", seeds=1, only=["warm"])


def test_what_it_refuses(source, effects, tmp_path, pretended):
    with pytest.raises(ConfigError, match=r"only: expected patterns of effects or of groups \(matching, optimizer\), got x"):
        ablation.run(source, effects, tmp_path / "out", only=["x"])
    need = tmp_path / "noisy"
    effects.write_text(TEXT.replace("seeds: 1", f"needs: [{need}]") + f"data: {{{need}: make noisy}}")
    with pytest.raises(ConfigError, match="data: expected the folder .*/noisy, which does not exist; to make it: make noisy"):
        ablation.run(source, effects, tmp_path / "out")
    ablation.run(source, effects, tmp_path / "out", only=["matching"], seeds=1)


def test_runs_of_other_defaults_are_not_taken_for_those_of_the_present(source, effects, tmp_path, pretended):
    out = tmp_path / "out"
    ablation.run(source, effects, out, seeds=1, only=["pm"])
    folder = next(out.glob("pm-variant-*"))
    stored = config.load(source, [f"run.out={folder}"]).to_dict()
    del stored["loss"]["plane"]  # a key that the earlier version did not have
    folder.with_name(f"{folder.name}.yaml").write_text(yaml.safe_dump(stored))
    ablation.run(source, effects, out, seeds=1, only=["pm"])
    stored["optim"]["lr"] = 0.5
    folder.with_name(f"{folder.name}.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError, match=rf"got {folder}: optim.lr was 0.5, now 0.001. Delete it to do it again"):
        ablation.run(source, effects, out, seeds=1, only=["pm"])


def test_runs_are_processes_and_ctrl_c_is_passed_on_once(source, effects, tmp_path, monkeypatch):
    """Each run gets one signal, since a second signal would end a run without saving."""
    ended = threading.Event()
    process = mock.Mock(terminate=mock.Mock(side_effect=ended.set))
    process.wait.side_effect = lambda: (os.kill(os.getpid(), signal.SIGINT), ended.wait(60), 130)[-1]
    started = mock.Mock(return_value=process)
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(ablation.subprocess, "Popen", started)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ablation.run(source, effects, tmp_path / "out", seeds=1, only=["pm"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.call_count == process.terminate.call_count == 1
    (command,), options = started.call_args
    assert (command[1:3], command[4:]) == (["-m", "benchmarks.ablation.worker"], [str(os.getpid())])
    assert (options["start_new_session"], options["env"]["OMP_NUM_THREADS"]) == (True, "4")


@pytest.mark.prove
def test_a_run_is_trained_evaluated_and_leaves_its_figures(source, effects, tmp_path):
    """Trains two runs: the prepared run, which is the base as well, and the variant."""
    effects.write_text(PREPARED.replace("name: warm, group: g, base: []", "name: warm, group: g, base: [optim.lr=0.5]"))
    out = tmp_path / "out"
    ablation.run(source, effects, out, seeds=1, only=["warm"], jobs=2)
    kept = {path.name.split("-s0")[0]: (path / "last.pt").exists() for path in out.iterdir() if path.is_dir()}
    assert kept == {"prepare-own": True, "warm-variant": False}
    own = next(out.glob("prepare-own-*/result.json"))
    assert f"inherited from {own.parent}/last.pt" in next(out.glob("warm-variant-*.log")).read_text().replace("\n", "")
    result = json.loads(own.read_text())
    assert result["step"] == 1
    assert result["parameters"] > 1e5
    assert 0 < result["seconds_per_step"] < 60
    found = CliRunner().invoke(app, ["evaluate", str(own.parent)])
    assert found.exit_code == 0, found.output
    expected = json.loads((own.parent / "evaluation.json").read_text())["splits"]
    for split in ("a", "b"):
        for direction in tables.DIRECTIONS:
            assert result["splits"][split][direction] == expected[split][direction]
        assert 0 < result["splits"][split]["AUC"] < 1


@pytest.mark.parametrize("matrix", [1 << 26, 60])
def test_auc_is_the_share_of_right_comparisons(matrix, monkeypatch):
    torch.manual_seed(0)
    groups, captions = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8, 9]), torch.tensor([0, 0, 1, 2, 3, 5, 6, 7, 8, 9, 9, 4])
    x, y = torch.randn(10, 4).round(), torch.randn(12, 4).round()  # rounded features, so that similarities are equal
    monkeypatch.setattr(worker, "MATRIX", matrix)
    split = types.SimpleNamespace(image_features=x, text_features=y, groups=groups, caption_groups=captions)
    shown = range(0, 10, 2 if matrix < 120 else 1)
    known = {groups[i].item() for i in shown}
    pairs = [(i, j) for i in shown for j in range(12) if captions[j].item() in known]
    of = lambda same: [(x[i] @ y[j]).item() for i, j in pairs if (groups[i] == captions[j]) == same]  # noqa: E731
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in of(True) for b in of(False)]
    assert worker.auc(split) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


@pytest.mark.slow
def test_a_run_stops_when_its_parent_has_ended(tmp_path):
    code = "import sys, time; from benchmarks.ablation import worker; worker.follow(int(sys.argv[1]), 0.1); time.sleep(60)"
    middle = "import subprocess as s, sys, os; print(s.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]).pid)"
    child = int(subprocess.run([sys.executable, "-c", middle, code], stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run goes on without its parent")


def test_rows_of_an_effect():
    pairs = [
        {"base": made_up(b, 1, 0.5), "variant": made_up(v, 2, 0.4)} for b, v in ((0.10, 0.14), (0.12, 0.20), (0.14, 0.14))
    ]
    every, a, _, auc = tables.effect_rows("g", "e", pairs)
    # Means over both directions are recall + 0.1 in split a, and recall / 2 + 0.1 in split b.
    assert (a["measure"], a["split"], a["base"], a["variant"]) == ("R@1", "a", 22.0, 26.0)
    assert (a["base std"], a["variant std"]) == (2.0, 3.464)
    assert (a["difference"], a["difference std"]) == (4.0, 4.0)
    assert (a["t"], a["p"]) == (1.732, pytest.approx(0.225403, abs=1e-6))
    assert (a["low"], a["high"]) == (-5.937, 13.937)
    assert (every["split"], every["base"], every["difference"]) == ("all", 19.0, 3.0)
    assert (a["base steps"], a["variant steps"], a["base s/step"], a["variant s/step"]) == (1, 2, 0.5, 0.4)
    assert (auc["measure"], auc["split"], auc["base"], auc["difference"]) == ("AUC", "all", 90.9, 0.3)
    (only, *_) = tables.effect_rows("g", "e", [{"variant": pair["variant"]} for pair in pairs])
    assert (only["base"], only["difference"], only["p"], only["base steps"]) == ("", "", "", "")
    assert only["variant"] == every["variant"]
