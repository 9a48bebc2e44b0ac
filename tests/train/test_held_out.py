"""A run that holds out a share of its data: what trains, what is evaluated, resuming, the best weights."""

import re

import pytest
import tiny
from pairs import call, one_line
from runs import bits, check_resumed, go, rows, state_of

from simplclip import data
from simplclip.train.config import ConfigError

HELD = ("eval.hold_out=0.4", "eval.every=3")


def held_keys(run):
    split = data.held_out(tiny.config.load(run / "config.yaml").held_out["held_out"])
    return [sample["__key__"] for source in split.sources for sample in split._read(source, data.Skipped())]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "changes"), [(4, []), (3, ["data.workers=2", "optim.ema=0.8"])])
def test_resuming_with_held_out_samples_is_bit_for_bit(tmp_path, monkeypatch, stop, changes):
    text = check_resumed(tmp_path, monkeypatch, stop, [*HELD, *changes])
    held = held_keys(tmp_path / "parts")
    assert 4 <= len(held) <= 16
    assert re.search(rf"^data       {24 - len(held)} images, 1 caption drawn of each; ", text, re.M)
    line = (
        f"held out   {len(held)} images, eval.hold_out=0.4 of all; 0 of their {len(held)} captions stand verbatim in training"
    )
    assert line in text
    assert rows(tmp_path / "whole", "evaluation.csv") == rows(tmp_path / "parts", "evaluation.csv")
    assert {row["split"] for row in rows(tmp_path / "whole", "evaluation.csv")} == {"held_out"}


@pytest.mark.slow
def test_what_is_held_out_stays_so_and_is_evaluated(tmp_path):
    go(tiny.settings(tmp_path, "eval.hold_out=0.4", "run.steps=2"))  # eval.every=0: for `evaluate` alone
    with pytest.raises(ConfigError, match="other settings: eval.hold_out was 0.4, now 0.2"):
        go(tiny.settings(tmp_path, "eval.hold_out=0.2", "run.steps=3"), resume=True)
    go(tiny.settings(tmp_path, "eval.hold_out=0.4", "eval.every=3", "run.steps=3"), resume=True)
    result = call("evaluate", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert f"held_out: {len(held_keys(tmp_path / 'run'))} samples read, 0 skipped" in result.output
    assert (tmp_path / "run/evaluation-held_out.png").exists()
    other = tiny.write_shard(tmp_path / "other.tar")
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace(str(tmp_path / "data/train-0.tar"), f"pipe:cat {other}"))
    assert "expected local files in the eval.splits of " in one_line("evaluate", tmp_path / "run")


def test_shares_and_names_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="eval.hold_out: expected less than 1, got 1"):
        tiny.settings(tmp_path, "eval.hold_out=1")
    with pytest.raises(ConfigError, match="eval: splits: expected another name than held_out"):
        tiny.settings(tmp_path, "eval.hold_out=0.1", "eval.splits.held_out=x.tar")
    with pytest.raises(ConfigError, match="leaves samples on both sides, got 0.001: 24 that train and 0 that are held out"):
        go(tiny.settings(tmp_path, "eval.hold_out=0.001"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_epochs_count_what_trains(tmp_path):
    division = data.divided(str(tiny.write_shard(tmp_path / "data/train-0.tar", copies=4)), 0.4)
    go(tiny.settings(tmp_path, "eval.hold_out=0.4", "run.epochs=1"))
    assert state_of(tmp_path / "run")["step"] == round(division.train / 8)
    assert bits(state_of(tmp_path / "run")["config"])["run"]["steps"] == round(division.train / 8)
