"""A run that fails after a whole step saves it to the bit, or says why not; a run that fails before leaves nothing."""

import multiprocessing
import os
import signal
import socket
import time
from unittest import mock

import pytest
import tiny
import torch
from kills import digests
from pairs import write
from runs import at_step, bits, check_ends_as, go, state_of

from simplclip import evaluation
from simplclip.data import loader
from simplclip.train import checkpoint, folder, metrics
from simplclip.train import loop as train
from simplclip.train.config import ConfigError
from simplclip.train.folder import run_lock

DROPOUT = "model.options.vision_cfg.timm_drop=0.2"  # draws from the global generator


def fails():
    raise OSError(5, "Input/output error")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Writes shards, and an undisturbed run on them in `whole`."""
    folder = tmp_path_factory.mktemp("errors")
    go(tiny.settings(folder, f"run.out={folder / 'whole'}", DROPOUT))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), None])
def test_an_error_within_a_step_saves_the_one_before_to_the_bit(tmp_path, monkeypatch, undisturbed, error):
    """The error comes after forward, when batch norms and the generator have advanced. None: the loss is not finite."""
    config = tiny.settings(undisturbed, DROPOUT, f"run.out={tmp_path / 'run'}")
    original = train.Training.terms

    def terms(this, *args, **outputs):
        if this.step < 4:
            return original(this, *args, **outputs)
        torch.rand(7)
        if error:
            raise error
        total, terms = original(this, *args, **outputs)
        return total * float("nan"), terms | {"pair_matching_loss": terms["pair_matching_loss"] * float("nan")}

    told = r"Saved step 4 in .*run/last.pt.*To go on: simplclip train"
    if error is None:
        told = r"step 5: not finite: loss=nan, contrastive_loss=\d.*, pair_matching_loss=nan.*Saved step 4 in .*run/last.pt"
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "terms", terms)
        with pytest.raises(train.TrainingError, match=told) as raised:
            go(config)
    assert raised.value.__cause__ is error or error is None
    assert checkpoint.load(tmp_path / "run")["step"] == 4
    check_ends_as(undisturbed / "whole", config)


@pytest.mark.slow
def test_an_error_within_the_update_is_told(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path, "run.save_every=2")
    original, fault = torch.optim.AdamW.step, mock.Mock(side_effect=[None, None, None, OSError(5, "Input/output error")])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **options: fault() or original(*args, **options))
    told = "The update of step 4 was interrupted.* not saved. The last checkpoint, .*last.pt of step 2, is intact"
    with pytest.raises(train.TrainingError, match=told):
        go(config)
    assert checkpoint.load(tmp_path / "run")["step"] == 2


def test_a_split_that_is_missing_or_broken_is_named_at_the_start(tmp_path):
    tiny.write_shard(tmp_path / "data" / "held.tar")
    write(tmp_path / "broken.tar", [("a", {"png": b"no image", "txt": b"a"})])
    (tmp_path / "no.tar").write_bytes(b"no tar" * 999)
    for file, told in (
        ("gone.tar", "which does not exist"),
        ("broken.tar", "no usable sample"),
        ("no.tar", "cannot be opened"),
    ):
        changes = "eval.every=4", f"eval.splits.held={tmp_path / 'data' / 'held.tar'}", f"eval.splits.bad={tmp_path / file}"
        with pytest.raises(ValueError, match=f"^eval.splits.bad: .*{file}.*{told}"):
            go(tiny.settings(tmp_path, *changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_fails_behind_a_step_saves_that_step(tmp_path, monkeypatch, undisturbed):
    """Logging, evaluation, and plotting at the end fail."""
    held = tiny.write_shard(tmp_path / "data" / "held.tar")
    config = tiny.settings(undisturbed, DROPOUT, "eval.every=4", f"eval.splits.held={held}", f"run.out={tmp_path / 'run'}")
    for target, name, step in ((metrics.RunLog, "write", 1), (evaluation, "encode", 4), (train, "curves", 7)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *a, **k: fails())
            with pytest.raises(train.TrainingError, match=f"after step {step}: OSError.* [Ss]tep {step} (is saved|in)|Saved"):
                go(config, resume=True)
        assert checkpoint.load(tmp_path / "run")["step"] == step
    assert bits(state_of(undisturbed / "whole")["model"]) == bits(state_of(tmp_path / "run")["model"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_former_checkpoint_and_says_so(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path, "run.save_every=2")
    original = torch.save

    def full(state, file):
        if state["step"] > 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        told = "Step 4 could not be saved: OSError: .*No space.*last.pt of step 2, is intact"
        with pytest.raises(train.TrainingError, match=told):
            go(config)
        patch.setattr(torch, "save", lambda *a: fails())
        with pytest.raises(train.TrainingError, match="There is no checkpoint"):
            go(tiny.settings(tmp_path, "run.save_every=2", f"run.out={tmp_path / 'other'}"))
    assert checkpoint.load(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.slow
def test_a_dead_loader_process_does_not_break_into_a_step(tmp_path, monkeypatch, undisturbed):
    config = tiny.settings(undisturbed, DROPOUT, "data.workers=1", f"run.out={tmp_path / 'run'}")
    done = []

    def kill():
        for child in multiprocessing.active_children():
            child.kill()
        until = time.monotonic() + 1  # the signal arrives while this loop runs
        while time.monotonic() < until:
            pass
        done.append(3)

    told = r"after step 4: WorkerError: data.workers: .* killed by signal.*Saved step 4.* --resume"
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        patch.setattr(loader, "RESTARTS", 0)
        with pytest.raises(train.TrainingError, match=told):
            go(config)
    assert done == [3]
    go(config, resume=True)
    assert bits(state_of(undisturbed / "whole")["model"]) == bits(state_of(tmp_path / "run")["model"])


def test_a_first_step_that_fails_leaves_nothing(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path)
    at_step(monkeypatch, 1, fails)
    with pytest.raises(OSError, match="Input/output"):
        go(config)
    assert not (tmp_path / "run").exists()


def hold(out, ready, done):
    with run_lock(out):
        ready.set()
        done.wait()


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready, done), daemon=True)
    process.start()
    assert ready.wait(120)
    before = digests(tmp_path / "run")
    told = f"run.out: .* process {process.pid} on host {socket.gethostname()} does"
    for resume in (False, True):
        with pytest.raises(ConfigError, match=told):
            go(tiny.settings(tmp_path), resume=resume)
    assert digests(tmp_path / "run") == before
    os.kill(process.pid, signal.SIGKILL)  # the system then releases the lock
    process.join()
    for name in (".config.yaml.tmp", ".last.pt.tmp", ".mine.tmp"):  # leftovers of a killed run, and a file of another program
        (tmp_path / "run" / name).write_bytes(b"half")
    assert "done" in go(tiny.settings(tmp_path, "run.steps=1"))
    assert not (tmp_path / "run" / "run.lock").exists()
    assert [p.name for p in (tmp_path / "run").glob(".*")] == [".mine.tmp"]


def test_without_locks_a_run_says_so(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    with run_lock(tmp_path / "run") as note:
        assert "cannot be locked (Operation not supported)" in note
