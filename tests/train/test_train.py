"""Training: resuming bit for bit, signals, crashes, refusals, and that it learns."""

import io
import os
import re
import signal

import pytest
import tiny
import torch
import yaml
from kills import digests
from PIL import Image
from rich.console import Console
from runs import at_step, bits, check_resumed, go, rows, state_of

from simplclip import losses
from simplclip.common import hardware, progress
from simplclip.common.errors import InputError
from simplclip.models.trained import load_model
from simplclip.train import checkpoint
from simplclip.train import loop as train
from simplclip.train.batches import loader
from simplclip.train.config import ConfigError
from simplclip.train.metrics import RunLog
from simplclip.train.state import lr_factor


@pytest.mark.slow
# An epoch has 3 batches: step 3 ends an epoch, step 5 lies within one.
@pytest.mark.parametrize(("stop", "workers", "precision"), [(5, 0, "fp32"), (3, 1, "bf16")])
def test_interrupted_and_resumed_is_bit_for_bit_the_undisturbed_run(tmp_path, monkeypatch, stop, workers, precision):
    # Dropout draws from the global generator in every step.
    dropout = "model.options.vision_cfg.timm_drop=0.2"
    check_resumed(tmp_path, monkeypatch, stop, [f"data.workers={workers}", f"run.precision={precision}", dropout])


@pytest.mark.slow
def test_it_learns_and_leaves_everything_behind(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=40", "run.log_every=4", "optim.lr=2e-3", "data.augment=none")
    out = tmp_path / "run"
    text = go(config)
    logged = rows(out)
    assert [int(r["step"]) for r in logged] == list(range(4, 41, 4))
    first, last = float(logged[0]["contrastive_loss"]), float(logged[-1]["contrastive_loss"])
    assert first > 1.5
    assert last < 0.6 * first
    for row in logged:
        assert float(row["loss"]) == pytest.approx(float(row["contrastive_loss"]) + float(row["pair_matching_loss"]), 1e-5)
    assert Image.open(out / "curves.png").size[0] > 600
    assert tiny.config.load(out / "config.yaml") == config
    assert sorted(p.name for p in out.glob("*.pt")) == ["last.pt"]
    for words in (
        *("siclip-tiny", "shaped_attention_fwd by cpu, similarity_loss_fwd by cpu", "precision  fp32 (as configured)"),
        *(f"CPU threads: {torch.get_num_threads()}", "step 40/40", " gone, ", "samples/s", "MiB", "epoch 0: 24 samples used"),
    ):
        assert words in text
    state = torch.load(out / "last.pt", weights_only=True)
    fresh = losses.ClipPMLoss()
    assert any(not torch.equal(state["loss"][k], v) for k, v in fresh.state_dict().items()), "the plane did not train"


@pytest.mark.slow
def test_evaluating_on_the_way_does_not_change_the_run(tmp_path):
    held = tiny.write_shard(tmp_path / "data" / "held.tar")
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'plain'}"))
    text = go(tiny.settings(tmp_path, f"run.out={tmp_path / 'seen'}", "eval.every=3", f"eval.splits.held={held}"))
    assert bits(state_of(tmp_path / "plain")["model"]) == bits(state_of(tmp_path / "seen")["model"])
    seen = rows(tmp_path / "seen", "evaluation.csv")
    assert [r["step"] for r in seen] == ["3", "3", "6", "6", "7", "7"]
    assert {r["direction"] for r in seen} == {"image_to_text", "text_to_image"}
    assert all(r["split"] == "held" and 0 <= float(r["R@5"]) <= 1 for r in seen)
    assert "evaluation held text to image: R@1" in text
    plain, more = (Image.open(tmp_path / name / "curves.png") for name in ("plain", "seen"))
    assert more.height > plain.height, "its last row has R@k over the steps"


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=2")
    assert "has no checkpoint yet: starting at step 0" in go(config, resume=True)
    before = digests(tmp_path / "run")
    with pytest.raises(ConfigError, match="run.out: expected a folder without a run, got .*; continue that run by --resume"):
        go(config)
    assert digests(tmp_path / "run") == before
    assert "done       step 2" in go(config, resume=True)  # all steps are done
    after = digests(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["metrics.csv"] == before["metrics.csv"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.out: expected a folder"):
        go(tiny.settings(tmp_path, f"run.out={tmp_path / 'file'}"))


@pytest.mark.slow
def test_resume_checks_the_settings(tmp_path):
    go(tiny.settings(tmp_path, "run.steps=4"))
    for changes, told in (
        (
            ["optim.lr=0.5", "data.batch_size=4"],
            "other settings: data.batch_size was 8, now 4; optim.lr was 0.001, now 0.5. A new run takes its weights: "
            "--set model.checkpoint=.*last.pt",
        ),
        (["run.seed=1", "run.precision=bf16"], "other settings: run.seed was 0, now 1; run.precision was 'fp32', now 'bf16'"),
        (["run.steps=3"], "run.steps: expected at least 4, the step of .*, got 3"),
        (["data.train=elsewhere/other-0.tar"], "data.train was"),
    ):
        with pytest.raises(ConfigError, match=told):
            go(tiny.settings(tmp_path, *changes), resume=True)
    os.rename(tmp_path / "data", tmp_path / "moved")
    go(tiny.settings(tmp_path, f"data.train={tmp_path}/moved/train-0.tar", "run.steps=6"), resume=True)
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == "6"
    config = tiny.settings(tmp_path, "run.steps=6")
    assert float(last["lr"]) == pytest.approx(config.optim.lr * lr_factor(5, config))


@pytest.mark.slow
def test_a_checkpoint_of_a_version_with_another_setting_says_which(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=1")
    go(config)
    path = tmp_path / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["run"]["epochs"]  # a setting that is newer than the checkpoint; settings that exist no more follow
    state["config"]["run"] |= {"save_minutes": 3.0, "print_every": 10}
    state["config"]["eval"]["batch_size"] = 256
    state["config"]["data"]["max_pixels"] = None
    state["config"]["optim"]["options"]["amsgrad"] = False
    torch.save(state, path)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    for same in (config, tiny.settings(tmp_path, "run.steps=1", "optim.options.eps=1e-6")):
        assert "done       step 1" in go(same, resume=True)
    assert "done       step 1" in go(tiny.config.load(tmp_path / "run" / "config.yaml"), resume=True)
    for section, name, value in (("run", "keep", 1), ("data", "max_pixels", 9)):
        state["config"][section][name] = value
        torch.save(state, path)
        for use in (lambda: go(config, resume=True), lambda: load_model(path)):
            with pytest.raises(InputError, match=rf"{name}: unknown key.* \(a checkpoint of a version with this setting "):
                use()
        del state["config"][section][name]


def test_learning_rate(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=110", "optim.warmup=10", "optim.lr=1.0")
    factor = [lr_factor(step, config) for step in range(111)]
    assert [factor[step] for step in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.5, 0.0])
    assert all(a >= b for a, b in zip(factor[10:], factor[11:]))


def test_only_matrices_decay(tmp_path):
    this = train.Training(tiny.settings(tmp_path, "optim.weight_decay=0.3"), torch.device("cpu"), "fp32")
    decayed, rest = this.optimizer.param_groups
    assert decayed["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0.0
    names = {id(p): n for n, p in [*this.model.named_parameters(), *this.loss.named_parameters()]}
    kept = {names[id(p)] for p in rest["params"]}
    assert "logit_scale" in kept
    assert {n for n, _ in this.loss.named_parameters()} <= kept
    assert all(n in kept for n in names.values() if "norm" in n or "bias" in n or "alpha" in n)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept) == len(names)


def test_logit_scale_is_held_below_100(tmp_path):
    this = train.Training(tiny.settings(tmp_path, "optim.warmup=0"), torch.device("cpu"), "fp32")
    with torch.no_grad():
        this.model.logit_scale.fill_(9.0)
    batch = next(iter(loader(this).epoch(0)))
    train.train_step(this, [batch])
    assert this.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with train.StopRequest(Console()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_save_that_fails_or_is_interrupted_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"step": 1})
    before = (tmp_path / "last.pt").read_bytes()
    original = torch.save

    def torn(state, file):
        original(state, file)
        file.write(b"half")
        raise KeyboardInterrupt if state["step"] == 2 else OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        for step, error in ((2, KeyboardInterrupt), (3, OSError)):
            with pytest.raises(error):
                checkpoint.save(tmp_path, {"step": step})
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt"]

    def signalled(state, file):
        os.kill(os.getpid(), signal.SIGINT)
        original(state, file)

    with monkeypatch.context() as patch, train.StopRequest(Console()) as stop:
        patch.setattr(torch, "save", signalled)
        checkpoint.save(tmp_path, {"step": 4})
    assert stop.requested
    assert checkpoint.load(tmp_path)["step"] == 4


def test_a_reader_that_goes_at_the_end_is_no_error(tmp_path):
    reader, writer = os.pipe()

    class Output(io.TextIOWrapper):
        def write(self, text):
            if text.startswith("done"):
                os.close(reader)
            return super().write(text)

    with Output(open(writer, "wb", buffering=0), write_through=True) as output:
        path = train.run(tiny.settings(tmp_path, "run.steps=1"), console=Console(file=output, width=500))
    assert checkpoint.load(path)["step"] == 1


@pytest.mark.slow
def test_lines_by_time_and_a_checkpoint_after_some_minutes(tmp_path, monkeypatch):
    """A step takes 20 seconds of this clock, so that the checkpoint of minute 1 is that of step 3."""
    saved = []
    original = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda out, state: saved.append(state["step"]) or original(out, state))

    class Clock:
        now = 0.0
        monotonic = staticmethod(lambda: Clock.now)
        perf_counter = staticmethod(lambda: Clock.now)

    for module in (train, progress):
        monkeypatch.setattr(module, "time", Clock)
    for step in range(1, 8):
        at_step(monkeypatch, step, lambda: setattr(Clock, "now", Clock.now + 20))
    monkeypatch.setattr(train, "SAVE_MINUTES", 1)
    text = go(tiny.settings(tmp_path))
    assert saved == [3, 6, 7]
    assert re.findall(r"^step (\d)/7  (.*?)  loss", text, re.M)[0] == ("1", "20 s gone, 2:00 left")
    assert f"done       step 7 in 2:20: {tmp_path / 'run' / 'last.pt'}" in text


def test_csv_of_a_run_keeps_its_columns_and_drops_later_rows(tmp_path):
    (tmp_path / "m.csv").write_text("step,loss\n1,0.5\n2,0.7\n3,")
    log = RunLog(tmp_path, 1)
    for step in (2, 3):
        log.write("m", {"step": step, "loss": 0.25})
    assert (tmp_path / "m.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.25\n"
    with pytest.raises(ValueError, match="m.csv: expected .* got step, loss"):
        RunLog(tmp_path, 1).write("m", {"step": 2, "other": 0.5})


def test_precision_and_device(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardware, "native_bf16", lambda device: True)
    assert hardware.pick_precision("auto", cpu)[0] == "bf16"
    monkeypatch.setattr(hardware, "native_bf16", lambda device: False)
    assert hardware.pick_precision("auto", cpu) == ("fp32", "auto: this cpu has no native bf16")
    assert hardware.pick_precision("fp16", cpu)[0] == "fp16"
    assert hardware.autocast("bf16", cpu).fast_dtype == torch.bfloat16
    for name, told in (("cuda:99", "device: expected"), ("gpu", "device: expected cpu, cuda or cuda:N, got 'gpu'")):
        with pytest.raises(ValueError, match=told):
            hardware.pick_device(name)
