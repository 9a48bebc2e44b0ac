"""Training on every form of data.train, and the messages of a run on its data."""

import csv
import os
import signal
import time

import pytest
import tiny
from pairs import table
from runs import at_step, bits, check_resumed, go, state_of

from simplclip import train
from simplclip.data import epoch, parts
from simplclip.train import checkpoint, folder
from simplclip.train.config import ConfigError

SLOW = 0.1  # seconds


@pytest.fixture
def forms(tmp_path):
    """Writes the same pictures as tars, a command's output, a table and a folder of images."""
    tiny.write_shard(tmp_path / "data" / "a.tar")
    rows = []
    for colour in tiny.COLOURS:
        for shape in tiny.SHAPES:
            path = tmp_path / "data" / "images" / f"{colour}-{shape}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tiny.picture(tiny.COLOURS[colour], shape))
            path.with_suffix(".txt").write_text(f"{colour} {shape}")
            rows.append([f"images/{path.name}", f"{colour} {shape}"])
    table(tmp_path / "data" / "t.csv", rows)
    return tmp_path / "data"


@pytest.mark.slow
def test_a_run_on_sources_with_weights_resumes_to_the_bit(tmp_path, monkeypatch, forms):
    weighted = f"[{{shards: {forms}/a.tar, weight: 1.5}}, {forms}/t.csv, {forms}/images, 'pipe:cat {forms}/a.tar']"
    check_resumed(tmp_path, monkeypatch, 5, [f"data.train={weighted}", "data.workers=2", "data.batch_size=20"])


@pytest.mark.slow
def test_the_data_may_move_but_not_change(tmp_path, forms):
    def with_weight(place, weight):
        train = f"data.train={{shards: [{place}/a.tar, {place}/t.csv], weight: {weight}}}"
        return tiny.settings(tmp_path, train, "run.steps=3" if place == forms else "run.steps=5")

    go(with_weight(forms, 2))
    os.rename(forms, tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"data.train.weight was 2, now 3"):
        go(with_weight(tmp_path / "moved", 3), resume=True)
    assert "continuing from step 3" in go(with_weight(tmp_path / "moved", 2), resume=True)
    other = [f"run.out={tmp_path / 'other'}", "run.steps=3"]
    go(tiny.settings(tmp_path, f"data.train={tmp_path}/moved/a.tar", *other))
    command = tiny.settings(tmp_path, f"data.train=pipe:cat {tmp_path}/moved/a.tar", *other)
    with pytest.raises(ConfigError, match="data.train was '.*a.tar', now 'pipe:cat .*a.tar'"):
        go(command, resume=True)


@pytest.mark.slow
def test_workers_are_the_cores_of_the_start_and_stay_so(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "cores", lambda: 2)
    config = tiny.settings(tmp_path, "data.workers=null")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(train.Interrupted):
            go(config)
    assert checkpoint.load(tmp_path / "run")["config"]["data"]["workers"] == 2
    assert "workers: 2" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr(folder, "cores", lambda: 1)
    assert "loader processes: 2" in go(config, resume=True)
    go(tiny.settings(tmp_path, "data.workers=2", f"run.out={tmp_path / 'other'}"))
    assert bits(state_of(tmp_path / "run")["model"]) == bits(state_of(tmp_path / "other")["model"])
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.undo()
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert folder.cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)


@pytest.mark.slow
def test_the_log_shows_the_time_that_is_spent_waiting_for_data(tmp_path, monkeypatch):
    """Compares a run with slow data and a run with slow steps, since a busy machine slows the other part, too."""

    def slowly(original):
        return lambda *args: time.sleep(SLOW) or original(*args)

    shares = {}
    for slow, owner, name in (("data", epoch.Epoch, "_prepare"), ("step", train.loop, "train_step")):  # 8 samples a step
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slowly(getattr(owner, name)))
            text = go(tiny.settings(tmp_path / slow, "run.steps=3"))
        with open(tmp_path / slow / "run" / "metrics.csv") as file:
            shares[slow] = float(list(csv.DictReader(file))[-1]["data_share"])
        assert f"waiting for data {shares[slow]:.0%}" in text.splitlines()[-3]
    assert 0 < 2 * shares["step"] < shares["data"] < 1


@pytest.mark.slow
def test_what_becomes_of_a_shard_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RETRIES", (0.01,))
    lost = f"data.train=[{tiny.write_shard(tmp_path / 'data' / 'a.tar')}, 'pipe:exit 3']"
    text = go(tiny.settings(tmp_path, lost))
    assert "1 unreadable shard (first: pipe:exit 3: shard 'pipe:exit 3' cannot be opened: the command ended with" in text
    with pytest.raises((train.TrainingError, parts.ShardError), match="cannot be opened: the command ended with exit code 3"):
        go(tiny.settings(tmp_path, lost, "data.options.on_error=stop", f"run.out={tmp_path / 'other'}"))


@pytest.mark.slow
def test_a_teachers_stamp_is_found_for_a_source_with_a_weight(tmp_path):
    config = tiny.settings(tmp_path, "loss.feature_weight=1", teacher=6)
    shard = config.data.train
    weighted = f"data.train=[{{shards: {shard}, weight: 2}}]"
    text = go(tiny.settings(tmp_path, "loss.feature_weight=1", weighted))
    assert "features of made up, 6 wide" in text
