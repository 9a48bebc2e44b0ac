"""Messages of a run before its first step and in its lines: sizes, times, and settings without the expected effect."""

import io
import re

import pytest
import tiny
import torch
from rich.console import Console
from runs import bits, check_ends_as, go, rows, state_of

from simplclip.common import hardware
from simplclip.train import announce, trust
from simplclip.train import loop as train
from simplclip.train.batches import batches, with_steps
from simplclip.train.config import ConfigError
from simplclip.train.state import Training

IDLE = {
    "inherit.train=[a]": "inherit.train = ['a'] has no effect without inherit.source",
    "inherit.blocks=first": "inherit.blocks = first has no effect without inherit.source",
    "loss.plane=hadamard": "loss.plane = hadamard has no effect without loss.pm_weight",
    "loss.interactive=kl": "loss.interactive = kl has no effect without loss.interactive_weight",
    "eval.every=2": "eval.every = 2 has no effect without eval.splits",
}


def warned(text):
    return re.findall("^warning    (.*)$", text, re.M)


@pytest.mark.slow
def test_data_and_settings_that_cannot_act(tmp_path):
    several = ["run.steps=1", "data.captions_per_image=3", "optim.warmup=9", "loss.pm_weight=0"]
    text = go(tiny.settings(tmp_path, *several, *IDLE))
    assert "data       24 images, 3 captions drawn of each: 72 pairs and 3.0 steps an epoch; the run is 0.3 epochs" in text
    told = "optim.warmup = 9 is longer than the run of 1 steps: the rate does not reach optim.lr"
    last = "data.captions_per_image = 3: 8 of the first 8 images have fewer different captions; "
    last += "these are drawn more than once"
    assert warned(text) == [told, *IDLE.values(), last]
    assert text.index(last) < text.index("step 1/1")
    out = f"run.out={tmp_path / 'other'}"
    assert warned(go(tiny.settings(tmp_path, "run.steps=2", "data.captions_per_image=2", "loss.plane=hadamard", out))) == []


def test_a_batch_that_is_larger_than_the_data(tmp_path):
    settings = ["run.steps=1", "data.batch_size=36", "data.micro_batch=12", "model.freeze_norms=true", "optim.warmup=1"]
    text = go(tiny.settings(tmp_path, *settings))
    assert "24 pairs and 0.7 steps an epoch; the run is 1.5 epochs" in text
    assert warned(text) == ["data.batch_size = 36 is more than the 24 images of an epoch: a step sees some more than once"]
    (told,) = announce.warnings(tiny.settings(tmp_path, "data.batch_size=36"), 24)
    assert told.endswith("no batch is full")


def test_samples_that_are_not_counted(tmp_path):
    shard = tiny.write_shard(tmp_path / "data" / "train-0.tar")
    stream = f"data.train=['pipe:cat {shard}', 'pipe:cat {shard}']"
    text = go(tiny.settings(tmp_path, "run.steps=1", stream))
    assert "data       shards: 2; images are not counted (streams, a broken shard, or more than" in text
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 1000)
    for train_on in (stream, f"data.train={tmp_path / 'broken.tar'}"):
        with pytest.raises(ConfigError, match="run.epochs: expected data.train whose samples are counted.*data index"):
            go(tiny.settings(tmp_path, "run.epochs=1", train_on, f"run.out={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_share_of_each_term(tmp_path):
    """With the weight that a warning names for a tenth, a term has that share; a tenth of this weight causes no warning."""
    for base in ("contrastive", "sigmoid"):

        def weak(weight, base=base):
            weights = ["loss.relational_weight=0.5", "loss.feature_weight={value: 0, to: 9}"]
            config = tiny.settings(tmp_path, f"loss.base={base}", f"loss.pm_weight={weight}", *weights, teacher=24)
            torch.manual_seed(0)
            this = Training(config, torch.device("cpu"), "fp32")
            (of_step,) = next(iter(batches(this, show=print)))
            before = torch.get_rng_state()
            features = this.outputs("image", of_step) | this.outputs("text", of_step)
            found = list(announce.weak_terms(this, [of_step], **features))
            assert torch.equal(before, torch.get_rng_state())
            assert this.objective.schedules == config.loss.weights
            assert "feature_loss" in config.loss.weights
            return found

        (told,) = weak(1e-5)
        tenth = re.fullmatch(r"loss.pm_weight = 1e-05 has \S+% of the gradient at step 1; (\S+) would give .* tenth", told)[1]
        assert 1e-3 < float(tenth) < 10
        assert weak(float(tenth) / 10) == []
        (again,) = weak(float(tenth) / 12)
        share, same = re.search("has (.*)% of .*; (.*) would", again).groups()
        assert float(share) == pytest.approx(100 / 12 / (9 + 1 / 12), rel=0.05)
        assert float(same) == pytest.approx(float(tenth), rel=0.01)


@pytest.mark.slow
def test_the_shares_change_no_bit(tmp_path, monkeypatch):
    settings = ["run.steps=2", "model.options.vision_cfg.timm_drop=0.2", "loss.pm_weight=1e-5"]
    settings += ["data.micro_batch=4", "model.freeze_norms=true"]
    assert len(warned(go(tiny.settings(tmp_path, *settings)))) == 1
    monkeypatch.setattr(announce, "first_terms", lambda training, show, *of, **features: training.terms(*of, **features))
    assert warned(go(tiny.settings(tmp_path, *settings, f"run.out={tmp_path / 'plain'}"))) == []
    assert bits(state_of(tmp_path / "run")) == bits(state_of(tmp_path / "plain"))
    assert rows(tmp_path / "run") == rows(tmp_path / "plain")


def test_epochs_become_steps(tmp_path):
    for changes, steps in (
        (["run.epochs=3"], 9),
        (["run.epochs=0.5", "data.batch_size=7"], 2),  # an epoch has 3 batches of 7
        (["run.epochs=2", "data.batch_size=12", "data.micro_batch=auto"], 4),
        (["run.epochs=2", "data.batch_size=18", "data.micro_batch=9"], 2),  # an epoch uses 18 of 24 images
        (["run.epochs=2", "data.batch_size=64"], 1),
        (["run.epochs=0.01"], 1),
    ):
        run = with_steps(tiny.settings(tmp_path, *changes)).run
        assert (run.steps, run.epochs) == (steps, None), changes
    weighted = f"data.train={{shards: {tmp_path / 'data' / 'train-0.tar'}, weight: 2.5}}"
    assert with_steps(tiny.settings(tmp_path, "run.epochs=2", weighted)).run.steps == 14  # an epoch has 7 batches of 8
    with pytest.raises(ConfigError, match="loss: expected at least one weight above 0 at every step, got none at step 8"):
        with_steps(tiny.settings(tmp_path, "run.epochs=3", "loss={contrastive_weight: {value: 1, until: 8}}"))


@pytest.mark.slow
def test_a_run_of_some_epochs_goes_on_for_more(tmp_path):
    whole = tiny.settings(tmp_path, "run.epochs=3", f"run.out={tmp_path / 'whole'}")
    assert "; the run is 3.0 epochs" in go(whole)
    assert [row["step"] for row in rows(tmp_path / "whole")][-1] == "9"
    stored = tiny.config.load(tmp_path / "whole" / "config.yaml")
    assert (stored.run.steps, stored.run.epochs) == (9, None)
    go(tiny.settings(tmp_path, "run.epochs=2"))
    text = go(tiny.settings(tmp_path, "run.epochs=3"), resume=True)
    assert "continuing from step 6; the learning rate now ends at 9, not 6" in text
    assert rows(tmp_path / "run")[-1]["step"] == "9"
    check_ends_as(tmp_path / "whole", with_steps(whole))
    assert trust.flag(stored) == ""


def test_memory_and_use_of_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (19 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    assert hardware.describe_gpu(cuda) == "  GPU 5.0 of 24.0 GiB, 97% busy"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (19 * 2**30, 24 * 2**30))
    assert hardware.describe_gpu(cuda) == "  GPU 5.0 of 24.0 GiB"  # without nvidia-ml-py and a driver
    assert hardware.describe_gpu(torch.device("cpu")) == ""


@pytest.mark.slow
def test_a_terminal_and_a_gpu_show_in_the_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "describe_gpu", lambda device: "  GPU 5.0 of")
    for live in (False, True):
        text = io.StringIO()
        console = Console(file=text, width=300, force_terminal=live)
        train.run(tiny.settings(tmp_path, "run.steps=2", f"run.out={tmp_path / str(live)}"), console=console)
        lines = re.findall(r"^.*step 2/2  \d s gone, 0 s left  loss .* MiB  GPU 5.0 of", text.getvalue(), re.M)
        assert len(lines) == 1
        assert ("first step" in text.getvalue()) == live
