"""A run that fails after a whole step saves it to the bit, or says why not; a run that fails before
leaves nothing.
"""

import multiprocessing
import os
import signal
from unittest import mock

import pytest
import torch
from rich.console import Console

from simplclip import evaluation
from simplclip.common import files
from simplclip.common.errors import InputError
from simplclip.data import ShardError
from simplclip.models.trained import read_checkpoint
from simplclip.train import log, loop, step
from simplclip.train.log import Log
from support.data.pairs import digests
from support.train import tiny
from support.train.runs import at_step, bits, check_ends_as, go, rows, state_of

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
def test_an_error_within_a_step_saves_the_one_before_to_the_bit(
    tmp_path, monkeypatch, undisturbed, error
):
    """After forward, when norms and the generator have advanced. None: the loss is not finite."""
    config = tiny.settings(undisturbed, DROPOUT, f"run.out={tmp_path / 'run'}")
    original = step.compute_losses

    def losses(state, *args, **features):
        if state.step < 4:
            return original(state, *args, **features)
        torch.rand(7)
        if error:
            raise error
        total, terms = original(state, *args, **features)
        return total * float("nan"), terms | {
            "pair_matching_loss": terms["pair_matching_loss"] * float("nan")
        }

    message = r"Step 4 is saved in .*run/last.pt.*To go on: simplclip train"
    if error is None:
        values = r"loss=nan, contrastive_loss=\d.*, pair_matching_loss=nan"
        message = f"step 5: not finite: {values}.*Step 4 is saved in "
    with monkeypatch.context() as patch:
        patch.setattr(step, "compute_losses", losses)
        with pytest.raises(loop.TrainingError, match=message) as raised:
            go(config)
    assert raised.value.__cause__ is error or error is None
    assert read_checkpoint(tmp_path / "run")["step"] == 4
    check_ends_as(undisturbed / "whole", config)


@pytest.mark.slow
def test_an_error_within_the_update_says_what_is_intact(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path, "run.save_every=2")
    original = torch.optim.AdamW.step
    # the first call tries the options
    fault = mock.Mock(side_effect=[None, None, None, None, OSError(5, "Input/output error")])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: fault() or original(*args))
    message = (
        "Step 3 is not saved: the update of step 4 was interrupted. .*last.pt of step 2 is intact"
    )
    with pytest.raises(loop.TrainingError, match=message):
        go(config)
    assert read_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_what_fails_behind_a_step_saves_that_step(tmp_path, monkeypatch, undisturbed):
    """Logging and drawing fail."""
    run, held = tmp_path / "run", tiny.write_shard(tmp_path / "data" / "held.tar")
    changes = ["eval.every=4", f"eval.splits.held={held}", f"run.out={run}"]
    config = tiny.settings(undisturbed, DROPOUT, *changes)
    for target, name, number in ((Log, "write", 1), (log, "write_curves", 4)):
        message = f"after step {number}: OSError.* Step {number} is saved"
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *a, **k: fails())
            with pytest.raises(loop.TrainingError, match=message):
                go(config, curves=True, resume=True)
        assert read_checkpoint(run / "last.pt")["step"] == number
    go(config, resume=True)
    assert bits(state_of(undisturbed / "whole")["model"]) == bits(state_of(run)["model"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, pytest.param(5, marks=pytest.mark.prove)])
def test_an_evaluation_that_failed_is_made_up(tmp_path, monkeypatch, step):
    """In the middle and at the end of a run; no row is doubled."""
    held = tiny.write_shard(tmp_path / "data" / "held.tar")
    splits = [f"eval.splits={{a: {held}, b: {held}}}", "eval.every=4", "run.steps=5"]
    whole, parts = (
        tiny.settings(tmp_path, *splits, f"run.out={tmp_path / name}")
        for name in ("whole", "parts")
    )
    go(whole)
    original = Log.write_evaluation

    def failing(log, split, *figures):
        if (log.state.step, split) == (step, "b"):
            fails()
        original(log, split, *figures)

    message = f"after step {step}: OSError.* Step {step} is saved"
    with monkeypatch.context() as patch:
        patch.setattr(Log, "write_evaluation", failing)
        for resume in (False, True):
            with pytest.raises(loop.TrainingError, match=message):
                go(parts, resume=resume)
    text = go(parts, resume=True)
    assert text.count("evaluation a text to image") == (2 if step == 4 else 1)
    assert rows(tmp_path / "parts", "evaluation.csv") == rows(tmp_path / "whole", "evaluation.csv")
    assert bits(state_of(tmp_path / "parts")) == bits(state_of(tmp_path / "whole"))
    assert "evaluation a" not in go(parts, resume=True)


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
        message = "Step 4 is not saved: OSError: .*No space.*last.pt of step 2 is intact"
        with pytest.raises(loop.TrainingError, match=message):
            go(config)
        patch.setattr(torch, "save", lambda *a: fails())
        with pytest.raises(loop.TrainingError, match="There is no checkpoint"):
            go(tiny.settings(tmp_path, "run.save_every=2", f"run.out={tmp_path / 'other'}"))
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_a_first_step_that_fails_leaves_nothing(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path)
    at_step(monkeypatch, 1, fails)
    with pytest.raises(OSError, match="Input/output"):
        go(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("no room"),
            "^step 2: out of memory. Step 1 is saved in .*. Try a smaller data.micro_batch.*"
            "simplclip plan.* To go on: ",
        ),
        (
            ShardError("sample 'a' has teacher features of another image"),
            "^after step 1: sample 'a' has teacher features of another image[.] Step 1 is saved in "
            ".* To go on: ",
        ),
    ],
)
def test_an_error_is_told_in_one_line(tmp_path, monkeypatch, error, message):
    at_step(monkeypatch, 2, mock.Mock(side_effect=error))
    with pytest.raises(loop.TrainingError, match=message):
        go(tiny.settings(tmp_path))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_that_comes_twice_does_not_end_at_once(name):
    """A closed terminal sends SIGHUP twice, the second one 0.3 ms later."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # also where the tests run under nohup
    try:
        with loop.StopSignals(Console()) as stop:
            for _ in range(2):
                os.kill(os.getpid(), number)
            assert stop.reason == name
    finally:
        signal.signal(number, before)


def test_ctrl_c_after_another_signal_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with loop.StopSignals(Console()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, name):
    """nohup ignores SIGHUP, and a shell SIGINT for a script's background job."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with loop.StopSignals(Console()) as stop:
            os.kill(os.getpid(), number)
            assert stop.reason is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason == "SIGTERM"
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def hold(out, ready, done):
    with files.locked(out, "run.out"):
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
    for resume in (False, True):
        with pytest.raises(
            FileExistsError,
            match="run.out: expected a folder that no other process writes to, got .*run",
        ):
            go(tiny.settings(tmp_path), resume=resume)
    assert digests(tmp_path / "run") == before
    os.kill(process.pid, signal.SIGKILL)  # the system then releases the lock
    process.join()
    # left by a killed run, and a file of another program
    for name in (".last.pt.0123456789abcdef.tmp", ".other.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    assert "done" in go(tiny.settings(tmp_path, "run.steps=1"))
    assert [p.name for p in (tmp_path / "run").glob(".*")] == [".other.tmp"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path, "run.steps=1")
    go(config)
    monkeypatch.setattr(files.os, "access", lambda path, *mode, **options: False)
    monkeypatch.setattr(loop, "make_state", fails)
    monkeypatch.setattr("simplclip.evaluation.run.encode", fails)
    message = "expected a folder that can be written to, got "
    for resume in (False, True):
        with pytest.raises(InputError, match=f"^run.out: {message}"):
            go(config, resume=resume)
    with pytest.raises(InputError, match=f"^out: {message}"):
        evaluation.evaluate(tmp_path / "run", {"held": str(tmp_path / "data" / "train-0.tar")})


def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        files.fcntl, "flock", mock.Mock(side_effect=OSError(95, "Operation not supported"))
    )
    with files.locked(tmp_path / "new" / "run", "run.out"):
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new").exists()
