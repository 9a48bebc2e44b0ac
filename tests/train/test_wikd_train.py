"""Training with a teacher in the shards, several captions, gradient caching and inherited weights, in the trainer."""

import io
import os
import resource
import subprocess
import sys
from functools import partial

import kills
import pytest
import tiny
import torch
from rich.console import Console
from runs import bits, check_resumed, go, rows, state_of

from simplclip import data
from simplclip.train import checkpoint
from simplclip.train import loop as train
from simplclip.train.batches import batches
from simplclip.train.config import ConfigError
from simplclip.train.state import Training

WIDTH = 256  # of siclip-tiny
WIKD = [
    "loss.feature_weight={value: 1.0, to: 0.0, end: 4}",
    "loss.relational_weight={value: 1.0, start: 2}",
    "loss.interactive_weight=1.0",
    "data.captions_per_image=2",
]
CACHED = ["data.micro_batch=4", "model.freeze_norms=true"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [WIKD, [*WIKD, *CACHED, "run.precision=bf16", "model.options.vision_cfg.timm_drop=0.2"]])
def test_it_trains_logs_every_term_and_resumes_bit_for_bit(tmp_path, monkeypatch, changes):
    text = check_resumed(tmp_path, monkeypatch, 4, changes, teacher=WIDTH)
    assert "WIKDLoss: contrastive, relational, interactive, feature, pair matching; features of made up, 256 wide" in text
    logged = rows(tmp_path / "whole")
    assert [float(row["relational_loss"]) > 0 for row in logged] == [False, False, True, True, True, True, True]
    assert [float(row["feature_loss"]) > 0 for row in logged] == [True, True, True, True, False, False, False]
    for row in logged:
        terms = sum(float(value) for name, value in row.items() if name.endswith("_loss"))
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-2 if "bf16" in str(changes) else 1e-5)


@pytest.mark.slow
def test_micro_batches_give_the_whole_batches_gradient(tmp_path, monkeypatch):
    """One step of each from the same weights; several captions, a teacher, group ids."""
    results = []
    for number, changes in ((1, CACHED[1:]), (2, CACHED)):
        torch.manual_seed(0)
        this = Training(tiny.settings(tmp_path, *WIKD, *changes, teacher=WIDTH), torch.device("cpu"), "fp32")
        this.step = 2  # all terms on
        torch.nn.init.normal_(this.model.text.transformer.resblocks[0].qk.weight, std=0.05)
        this.model.train()
        of_step = next(batches(this))
        assert len(of_step) == number
        monkeypatch.setattr(this.optimizer, "step", lambda: None)
        row = train.train_step(this, of_step)
        named = [*this.model.named_parameters(), *this.loss.named_parameters()]
        results.append((row, {name: parameter.grad for name, parameter in named}))
    (row, grads), (cached_row, cached) = results
    assert cached_row == pytest.approx(row, rel=1e-4)
    assert grads.keys() == cached.keys()
    for name, grad in grads.items():
        assert (grad - cached[name]).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.slow
def test_a_batch_larger_than_the_data_takes_several_epochs(tmp_path):
    changes = ["data.batch_size=40", "data.micro_batch=8", "run.steps=3", "model.freeze_norms=true"]
    assert "step 3/3" in go(tiny.settings(tmp_path, *changes))
    state = checkpoint.load(tmp_path / "run")
    assert (state["epoch"], state["batch"]) == (4, 3), "15 micro-batches, 3 an epoch, the last one not yet left"


@pytest.mark.slow
def test_many_micro_batches_do_not_use_up_file_descriptors(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limit[1]))
    try:
        changes = ["data.micro_batch=1", "data.batch_size=48", "data.workers=1", "run.steps=1", "model.freeze_norms=true"]
        assert "step 1/1" in go(tiny.settings(tmp_path, *changes))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.slow
def test_no_teacher_is_in_memory(tmp_path):
    """In a fresh process: after steps with every term on, the only parameters are the student's and the loss's."""
    config = tiny.write_config(tmp_path, teacher=WIDTH)
    code = f"""
import gc, sys
import torch
from simplclip.train import config
from simplclip.train import loop
made = []
original = loop.Training.__init__
def remember(self, *a, **k):
    original(self, *a, **k)
    made.append(self)
loop.Training.__init__ = remember
loop.run(config.load({config!r}, {[*WIKD, "run.steps=3"]!r}))
this = made[0]
ours = {{id(m) for root in (this.model, this.loss) for m in root.modules()}}
others = [m for m in gc.get_objects() if isinstance(m, torch.nn.Module) and id(m) not in ours and list(m.parameters(False))]
print("others", sum(p.numel() for m in others for p in m.parameters(False)))
print("loaded", [n for n in sys.modules if n.startswith("simplclip.teacher")])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "others 0" in run.stdout
    assert "loaded []" in run.stdout


@pytest.mark.parametrize(
    ("change", "teacher", "error", "message"),
    [
        ("loss.feature_weight=1", 0, data.ShardError, "no teacher is named in .*meta.json; make them by `simplclip teacher`"),
        ("loss.feature_weight=1", 16, ConfigError, "loss.projection: expected true, since the teacher's features have width"),
        ("inherit.source=nowhere.pt", 0, Exception, "nowhere.pt"),
        ("data.micro_batch=4", 0, ValueError, "model: expected no batch statistics, got BatchNorm"),
        ("data.train=nothing-*.tar", 0, ValueError, "matches none"),
        ("data.batch_size=100", 0, RuntimeError, "batch_size 100"),
        ("model.options.depth=3", 0, ConfigError, "model.options"),
    ],
)
def test_what_does_not_fit_is_one_error_and_leaves_nothing(tmp_path, change, teacher, error, message):
    out = tmp_path / "new" / "run"
    with pytest.raises(error, match=message):
        go(tiny.settings(tmp_path, change, f"run.out={out}", teacher=teacher))
    assert not out.parent.exists()


def test_a_teacher_of_another_width_is_projected(tmp_path):
    changes = ["loss.feature_weight=1", "loss.interactive_weight=1", "loss.projection=true", "run.steps=2"]
    go(tiny.settings(tmp_path, *changes, teacher=16))
    assert checkpoint.load(tmp_path / "run")["loss"]["image_projections.0"].shape == (16, WIDTH)


@pytest.mark.slow
def test_resume_of_a_checkpoint_from_before_these_settings(tmp_path):
    go(tiny.settings(tmp_path, "run.steps=2"))
    last = tmp_path / "run" / "last.pt"
    state = checkpoint.load(last)
    loss, pairs = state["config"]["loss"], state["config"]["data"]
    del state["frozen"], state["config"]["inherit"], pairs["micro_batch"], pairs["captions_per_image"]
    del loss["feature_weight"], loss["relational_weight"], loss["projection"], loss["contrastive_weight"]
    torch.save(state, last)
    assert "continuing from step 2" in go(tiny.settings(tmp_path, "run.steps=3"), resume=True)


def work(config, changes, out, ready):
    torch.set_num_threads(1)
    ready.set()
    train.run(tiny.config.load(config, [*changes, f"run.out={out}"]), resume=True, console=Console(file=io.StringIO()))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_undisturbed(tmp_path):
    """Weights, optimizer, random states and logged figures to the bit; what is there after a kill is a whole checkpoint."""
    config = tiny.write_config(tmp_path, teacher=WIDTH)
    changes = [*WIKD, *CACHED, "data.workers=1", "run.save_every=1", "run.steps=6"]

    def check_whole(out):
        for path in out.glob("*.pt"):
            assert 1 <= checkpoint.load(path)["step"] <= 6

    def content(out):
        assert not list(out.glob(".*")), "a torn file was left"
        return bits(state_of(out)), rows(out)

    kills.check(["simplclip.train", "test_wikd_train"], partial(work, config, changes), tmp_path, check_whole, content)
