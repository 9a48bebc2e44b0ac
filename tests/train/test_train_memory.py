"""A run that plans its micro-batches, a capped run, and a run that resumes after running out of memory."""

import hashlib
import subprocess
import sys
from unittest import mock

import pytest
import tiny
import torch
from runs import at_step, go, rows

from simplclip import memory
from simplclip.common import hardware
from simplclip.memory.measure import predict
from simplclip.memory.step import TrainerStep
from simplclip.train import checkpoint, limits
from simplclip.train.config import ConfigError
from simplclip.train.loop import TrainingError

FROZEN = "model.freeze_norms=true"
CPU = torch.device("cpu")


@pytest.mark.slow
def test_auto_takes_what_fits(tmp_path, monkeypatch):
    def settings(micro, *changes):
        return tiny.settings(tmp_path, FROZEN, "data.batch_size=24", f"data.micro_batch={micro}", *changes)

    def usable(size):
        monkeypatch.setattr(limits.Budget, "usable", property(lambda self: size))

    told = go(settings("auto", f"run.out={tmp_path / 'whole'}", "run.steps=1"), planner=memory)
    assert "memory     data.micro_batch = null fits in" in told

    usable(sum(predict(TrainerStep(settings(micro), "fp32"), CPU).peak for micro in (4, 6)) // 2)
    told = go(settings("auto", "run.steps=2"), planner=memory)
    assert checkpoint.load(tmp_path / "run")["config"]["data"]["micro_batch"] == 4
    assert f"data.micro_batch = 4 fits in {limits.gib(limits.Budget(0).usable)}, by simplclip plan" in told
    usable(1 << 20)
    with pytest.raises(ConfigError, match="data.micro_batch: expected one that fits .* even with 1 at a time"):
        limits.MemoryLimit(CPU, planner=memory).with_micro_batch(settings("auto"))
    usable(1 << 40)  # resuming takes the checkpoint's value, without another plan
    told = go(settings("auto", "run.steps=3"), resume=True, planner=memory)
    assert "by simplclip plan" not in told
    assert checkpoint.load(tmp_path / "run")["config"]["data"]["micro_batch"] == 4


@pytest.mark.slow
def test_going_on_with_other_micro_batches(tmp_path):
    """Steps see the same images, since the position in the epoch is converted; some positions cannot be."""
    settings = lambda out, *changes: tiny.settings(tmp_path, FROZEN, f"run.out={out}", *changes)  # noqa: E731
    losses = []
    for second in (4, 2):
        out = tmp_path / str(second)
        go(settings(out, "data.micro_batch=4", "run.steps=2"))
        go(settings(out, f"data.micro_batch={second}", "run.steps=4"), resume=True)
        assert [row["step"] for row in rows(out)] == ["1", "2", "3", "4"]
        losses.append([float(row["contrastive_loss"]) for row in rows(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    torch.save(checkpoint.load(out) | {"batch": 5}, out / "last.pt")  # as after a step with micro-batches of two epochs
    with pytest.raises(ConfigError, match="data.micro_batch: expected a divisor of the 10 images that .* has seen of its"):
        go(settings(out, "data.micro_batch=4", "run.steps=5"), resume=True)


def test_limits_that_cannot_be(monkeypatch):
    for limit in (1 << 20, 1 << 60):
        with pytest.raises(ValueError, match="--memory-limit: expected more than the .* MiB in use and at most"):
            limits.MemoryLimit(CPU, limit)
    monkeypatch.setattr(limits, "resource", None)
    with pytest.raises(ValueError, match="--memory-limit: expected a GPU or Linux"):
        limits.MemoryLimit(CPU, hardware.process_bytes("VmData") + (1 << 30))


def test_what_running_out_is():
    assert limits.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert limits.ran_out(error.value)
    assert not limits.ran_out(RuntimeError("the size of tensor a must match"))


@pytest.mark.slow
def test_a_step_that_does_not_fit_ends_with_the_plans_advice(tmp_path, monkeypatch):
    tiny.write_shard(tmp_path / "data" / "train-0.tar", copies=4)  # 96 images
    changes = [FROZEN, "data.batch_size=96", "run.steps=2"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, mock.Mock(side_effect=torch.OutOfMemoryError("no room")))
        with pytest.raises(TrainingError, match=r"step 2: out of memory\. Saved step 1 in .* this step takes 0\.") as error:
            go(tiny.settings(tmp_path, *changes), planner=memory)
    assert "Try data.micro_batch=24 (gradient caching)" in str(error.value)
    go(tiny.settings(tmp_path, *changes, "data.micro_batch=24"), resume=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"]


@pytest.mark.prove
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux caps the data segment")
def test_out_of_memory_ends_with_the_plans_advice(tmp_path):
    """A run is capped when it is resumed: its checkpoint stays whole, and the run completes with the advice."""
    path, out = tiny.write_config(tmp_path), tmp_path / "run"
    tiny.write_shard(tmp_path / "data" / "train-0.tar", copies=22)  # 528 images

    changes = [FROZEN, "data.batch_size=512", "run.save_every=1"]
    go(tiny.config.load(path, [*changes, "run.steps=1"]))
    before = hashlib.sha256((out / "last.pt").read_bytes()).digest()
    # The limit is the memory that a process of this command has before its first step, and a part of what a step needs.
    program = """if True:
        import sys
        import simplclip.memory
        from simplclip.commands.main import main
        from simplclip.common import hardware
        sys.argv[1:] = ["train", *sys.argv[1:], "--memory-limit", f"{hardware.process_bytes('VmData') / 2**20 + 450:.0f}MiB"]
        main()
    """

    def train(code, *more):
        settings = [word for change in (*changes, "run.steps=2", *more) for word in ("--set", change)]
        command = [sys.executable, "-c", program, path, *settings, "--resume"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stderr

    error = train(1)
    assert f"step 2: out of memory. Step 1 is saved in {out}/last.pt. The plan: this step takes 0." in error
    assert "Try data.micro_batch=128 (gradient caching)" in error
    assert hashlib.sha256((out / "last.pt").read_bytes()).digest() == before

    train(0, "data.micro_batch=32")
    assert [row["step"] for row in rows(out)] == ["1", "2"]
