"""A run that ends at any point and goes on ends as one that was not stopped, to the bit."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
import yaml

from simplclip import models
from simplclip.models.trained import CheckpointError, read_checkpoint
from simplclip.train import loop, step
from simplclip.train.config import ConfigError, load
from support.data.pairs import digests
from support.paths import PYTHONPATH
from support.programs import call, forked
from support.train import tiny
from support.train.runs import at_step, bits, go, rows, state_of

pytestmark = pytest.mark.long

DROPOUT = "model.options.vision_cfg.timm_drop=0.2"  # draws from the global generator
HELD = ["eval.hold_out=0.4", "eval.every=3", "run.save_every=3"]
SMALL = "vision_cfg: {layers: 2, width: 32, head_width: 16, patch_size: 8, image_size: 16}"
SMALL += ", text_cfg: {layers: 2, width: 32, heads: 2}, embed_dim: 16"
NAME = "open_clip:ViT-B-32"
LORA = f"model={{name: '{NAME}', options: {{{SMALL}}}, checkpoint: WEIGHTS, "
LORA += "lora: {rank: 4, dropout: 0.1}}"
STAGES = [
    "loss.base=sigmoid",
    "loss.feature_weight={value: 1.0, until: 2}",
    "loss.relational_weight={value: 1.0, start: 2, until: 4}",
    "loss.interactive_weight={value: 1.0, start: 4}",
    "data.captions_per_image=2",
    "data.micro_batch=4",
]
DECAY = ["loss.pm_weight=0", "optim.ema=0.5", "optim.lr=0.01", "optim.layer_decay=0.8"]
MUON = ["optim.name=muon", "optim.options={}", "optim.warmup=5", "optim.layer_decay=0.7"]
MUON += ["optim.ema=0.5", "optim.lr_scale={visual.trunk.patch_embed: 0, text: 0.5}"]
SOURCES = "data.train=[{shards: DATA/train-0.tar, weight: 2}, DATA/train-1.tar]"
COMPILED = ["run.compile=true", "data.micro_batch=4"]
# what ends the run, in the middle of which step, and its settings
CASES = {
    "dropout": ("SIGINT", 5, [DROPOUT]),
    "an error": ("error", 5, [DROPOUT]),
    "bf16": ("SIGTERM", 3, ["data.workers=2", "run.precision=bf16", "data.micro_batch=4"]),
    "LoRA": ("SIGKILL", 5, [LORA, *DECAY, *HELD]),
    "Muon": ("SIGTERM", 3, MUON),
    "stages of a teacher": ("SIGKILL", 6, [*STAGES, "run.save_every=3"]),
    "weighted sources": ("SIGINT", 5, [SOURCES, "data.workers=3", DROPOUT]),
    "held out": ("SIGTERM", 3, [*HELD, "data.workers=2", "optim.ema=0.8"]),
    "compiled": ("SIGINT", 4, COMPILED),
}


def end(kind):
    if kind == "error":
        torch.rand(7)
        raise OSError(5, "Input/output error")
    os.kill(os.getpid(), getattr(signal, kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_ended_goes_on_as_if_it_had_not(tmp_path, monkeypatch, name):
    kind, stop, changes = CASES[name]
    if name == "compiled":
        backend = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", backend)
    weights = tmp_path / "weights.pt"
    torch.save(models.create(NAME, **yaml.safe_load(f"{{{SMALL}}}")).state_dict(), weights)
    tiny.write_shard(tmp_path / "data" / "train-1.tar")
    changes = [c.replace("WEIGHTS", str(weights)) for c in changes]
    changes = [c.replace("DATA", str(tmp_path / "data")) for c in changes]
    teacher = 256 * (name == "stages of a teacher")
    whole, parts = (
        tiny.settings(tmp_path, *changes, f"run.out={tmp_path / out}", teacher=teacher)
        for out in ("whole", "parts")
    )
    if kind == "SIGKILL":  # in a fork, before this process has the threads of autograd
        with monkeypatch.context() as patch:
            at_step(patch, stop, functools.partial(end, kind))
            assert forked(functools.partial(go, parts)) == -signal.SIGKILL
        saved = 3
    else:
        saved = stop - (kind == "error")
        message = f"Step {saved} is saved in " if kind == "error" else f"{kind}: saved step {saved}"
        with monkeypatch.context() as patch:
            at_step(patch, stop, functools.partial(end, kind))
            with pytest.raises((loop.Interrupted, loop.TrainingError), match=message):
                go(parts)
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == saved
    go(whole)
    torch.rand(3)  # another process would start from other random numbers
    assert f"continuing from step {saved}" in go(parts, resume=True)
    for file in ("last.pt", "best.pt") if HELD[0] in changes else ("last.pt",):
        assert bits(state_of(tmp_path / "whole", file)) == bits(state_of(tmp_path / "parts", file))
    for file in ("metrics.csv", "evaluation.csv"):
        if (tmp_path / "whole" / file).exists():
            assert rows(tmp_path / "whole", file) == rows(tmp_path / "parts", file)
    assert not list((tmp_path / "parts").glob(".*.tmp")), "of a killed run"


@pytest.mark.slow
def test_the_command_continues_with_the_runs_config_and_then_set(tmp_path):
    file, run = tiny.write_config(tmp_path), tmp_path / "run"
    begun = call("train", file, "--set", "run.steps=2", "--set", "optim.lr=0.5", "--resume")
    assert begun.exit_code == 0, begun.output
    assert "has no checkpoint yet: starting at step 0" in begun.output
    changes = ("run.steps=3", "optim.weight_decay=0.5")
    done = call("train", file, *(f"--set={change}" for change in changes), "--resume")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("resume ")]
    assert lines == [
        f"resume     {run / 'config.yaml'} is used, not {file}, which differs in optim.lr; --set "
        "changes settings",
        "resume     continuing from step 2",
        "resume     optim.weight_decay was 0.1, now 0.5",
        "resume     run.steps was 2, now 3",
    ]
    assert load(run / "config.yaml").optim.lr == 0.5
    assert {group["weight_decay"] for group in state_of(run)["optimizer"]["param_groups"]} == {
        0.0,
        0.5,
    }


@pytest.mark.slow
def test_what_a_checkpoint_cannot_take_is_refused_in_one_line(tmp_path):
    go(tiny.settings(tmp_path, "run.steps=2"))
    before = digests(tmp_path / "run")
    for change, error, message in (
        ("run.steps=1", ConfigError, "run.steps: expected at least 2, the step of .*, got 1"),
        ("optim.name=lion", ConfigError, "optim.name: expected 'adamw', with which the run began"),
        ("model.options.embed_dim=32", CheckpointError, "checkpoint: expected the state of this"),
        ("optim.layer_decay=0.5", CheckpointError, "checkpoint: expected the state of .*AdamW"),
    ):
        with pytest.raises(error, match=message):
            go(tiny.settings(tmp_path, change), resume=True)
    assert digests(tmp_path / "run") == before
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["rng"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="to continue from, got one without rng"):
        go(tiny.settings(tmp_path), resume=True)


@pytest.mark.slow
def test_other_data_start_the_epoch_again(tmp_path):
    pattern = f"data.train={tmp_path / 'data' / '*.tar'}"
    go(tiny.settings(tmp_path, pattern, "run.steps=2"))
    config = tiny.settings(tmp_path, pattern, "run.steps=3")
    assert "starts again" not in go(config, resume=True)
    tiny.write_shard(tmp_path / "data" / "train-1.tar")
    text = go(config.replaced(run={"steps": 4}), resume=True)
    assert "or eval.hold_out were others: the epoch starts again" in text
    # a pass that started again goes on in its own order
    assert "starts again" not in go(config.replaced(run={"steps": 5}), resume=True)
    held_out = config.replaced(run={"steps": 6}, eval={"hold_out": 0.2})
    assert "eval.hold_out were others: the epoch starts again" in go(held_out, resume=True)


@pytest.mark.slow
def test_an_error_in_the_update_or_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = tiny.settings(tmp_path, "run.save_every=2")
    update = torch.optim.AdamW.step
    # the first call tries the options
    fault = mock.Mock(side_effect=[None, None, None, None, OSError(5, "Input/output error")])
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *args: fault() or update(*args))
        message = "Step 3 is not saved: the update of step 4 was .*last.pt of step 2 is intact"
        with pytest.raises(loop.TrainingError, match=message):
            go(config)
    assert read_checkpoint(tmp_path / "run")["step"] == 2

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = "Step 4 is not saved: OSError: .*No space.*last.pt of step 2 is intact"
        with pytest.raises(loop.TrainingError, match=message):
            go(config, resume=True)
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("no room"),
            "^step 2: out of memory. Step 1 is saved in .*. Try a smaller data.micro_batch.*"
            "simplclip plan.* To go on: ",
        ),
        (
            step.TrainingError("step 2: not finite: loss=nan"),
            "^step 2: not finite: loss=nan. Step 1 is saved in [^ ]*$",
        ),
    ],
)
def test_an_error_is_told_in_one_line(tmp_path, monkeypatch, error, message):
    at_step(monkeypatch, 2, mock.Mock(side_effect=error))
    with pytest.raises(loop.TrainingError, match=message):
        go(tiny.settings(tmp_path))


def test_a_first_step_that_fails_leaves_nothing(tmp_path, monkeypatch):
    at_step(monkeypatch, 1, functools.partial(end, "error"))
    with pytest.raises(OSError, match="Input/output"):
        go(tiny.settings(tmp_path))
    assert not (tmp_path / "run").exists()


LOCKS = """if True:
    import sys
    from pathlib import Path
    from simplclip.common.files import locked
    with locked(Path(sys.argv[1]), "run.out"):
        print("in", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", LOCKS, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(FileExistsError, match="run.out: expected a folder that no other pro"):
            go(tiny.settings(tmp_path))
        process.kill()  # the system then releases the lock
    assert "done" in go(tiny.settings(tmp_path, "run.steps=1"))


SIGNALS = [["SIGTERM", "SIGTERM"], ["SIGHUP", "SIGHUP"], ["SIGTERM", "SIGINT"]]


@pytest.mark.parametrize("names", SIGNALS, ids="-".join)
@pytest.mark.parametrize("ignored", [False, True])
def test_signals_that_come_twice(names, ignored):
    """Ctrl-C then ends at once, others do not; what nohup ignores stays ignored."""
    numbers = [getattr(signal, name) for name in names]
    before = signal.signal(numbers[0], signal.SIG_IGN if ignored else signal.SIG_DFL)
    ends = contextlib.nullcontext()
    if names[1] == "SIGINT" and not ignored:
        ends = pytest.raises(KeyboardInterrupt)
    try:
        with loop.StopSignals() as stop, ends:
            for number in numbers:
                os.kill(os.getpid(), number)
            if ignored and names[1] != "SIGINT":
                assert stop.reason is None
                return
            assert stop.reason == (names[1] if ignored else names[0])
    finally:
        signal.signal(numbers[0], before)


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_saves_and_ends(tmp_path):
    """With a loader process, which gets the signal too."""
    changes = ["run.steps=4000", "data.workers=1"]
    command = [sys.executable, "-m", "simplclip", "train", tiny.write_config(tmp_path)]
    command += [f"--set={change}" for change in changes]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as run:
        while not run.stdout.readline().startswith("ops "):
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)
        errors = run.stderr.read()
        assert run.wait(300) == 130, errors
    assert "Traceback" not in errors
    step = read_checkpoint(tmp_path / "run")["step"]
    assert f"SIGINT: saved step {step} of 4000" in errors
    assert f"To go on: simplclip train {tmp_path / 'run/config.yaml'} --resume" in errors
