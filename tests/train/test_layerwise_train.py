"""loss.block_weight: layer-wise distillation in the trainer, as a first stage or beside the other terms."""

import gc
import weakref
from functools import partial

import pytest
import tiny
import torch
from runs import check_resumed, go, rows
from torch import nn

from simplclip import models
from simplclip.models.layerwise import block_distance
from simplclip.train import checkpoint, config
from simplclip.train import loop as train
from simplclip.train.config import ConfigError
from simplclip.train.state import Training

CPU = torch.device("cpu")
FIRST = ["loss.block_weight={value: 2, until: 4}"]  # a stage alone, then another one
LATER = ["loss.contrastive_weight={value: 1, start: 4}", "loss.pm_weight={value: 1, start: 4}"]


@pytest.fixture
def source(tmp_path):
    """`inherit.source`: a model with blocks of its own, whose weights are large enough to change the residual stream."""
    torch.manual_seed(3)
    original = models.create("siclip-tiny", simplified=False, **tiny.MODEL)
    with torch.no_grad():
        for block in (original.text.transformer.resblocks, original.visual.trunk.blocks):
            for p in block.parameters():
                p.mul_(4)
    torch.save(original.state_dict(), tmp_path / "original.pt")
    return f"inherit.source={tmp_path / 'original.pt'}"


def started(folder, *changes, precision="fp32"):
    torch.manual_seed(0)
    this = Training(tiny.settings(folder, *changes), CPU, precision)
    this.model.train()
    return this, next(train._batches(this, train._loader(this, False), print))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_term_is_the_weighted_mean_over_the_blocks(tmp_path, source, precision):
    this, batches = started(tmp_path, source, "loss.block_weight=3", precision=precision)
    original = models.create("siclip-tiny", checkpoint=tmp_path / "original.pt", simplified=False, **tiny.MODEL).eval()
    found = {}
    for model in (this.model, original):
        keep = lambda module, args, output, to: to.append(output)  # noqa: E731
        for path in ("visual.trunk.blocks.0", "text.transformer.resblocks.0"):
            model.get_submodule(path).register_forward_hook(partial(keep, to=found.setdefault(path, [])))
    text = batches[0]["text"].flatten(0, -2)
    model, this.model = this.model, original
    with torch.no_grad():
        this.encode_image(batches[0]), this.encode_text(batches[0])
        of_original = {path: list(outputs) for path, outputs in found.items()}
        this.model = model
        terms = this.terms(batches, **this.outputs("image", batches[0]), **this.outputs("text", batches[0]))
    image, words = ([*of_original[path], *found[path][-1:]] for path in found)
    want = block_distance(image[1], image[0]), block_distance(words[1], words[0], text.argmax(-1) + 1)
    rounding = 1e-5 if precision == "fp32" else 1e-3  # the inherited modules before the blocks run folded
    assert terms["block_loss"].item() == pytest.approx(3 * sum(d.mean().item() for d in want) / 2, rel=rounding)
    assert terms["block_loss"] > 0.3
    dtypes = {p.dtype for p in this.distillation.originals.parameters()}
    assert dtypes == ({torch.float32} if precision == "fp32" else {torch.float32, torch.bfloat16})


def test_a_stage_of_its_own_and_what_remains_after_it(tmp_path, source, monkeypatch):
    """The term alone trains the blocks; then its blocks are freed and the other terms begin."""
    alive, step = [], train.train_step

    def stepping(this, batches):
        if not alive:
            alive.append(weakref.ref(this.distillation.originals[0]))
        row = step(this, batches)
        gc.collect()
        alive.append(alive[0]() is not None)
        return row

    monkeypatch.setattr(train, "train_step", stepping)
    text = go(tiny.settings(tmp_path, source, *FIRST, *LATER, "optim.lr=1e-2"))
    assert "originals  2 blocks to learn from are in memory" in text
    assert "up to step 4" in text
    assert "ClipPMLoss: contrastive, pair matching, block" in text
    logged = [{name: float(value) for name, value in row.items()} for row in rows(tmp_path / "run")]
    for row, kept in zip(logged, alive[1:], strict=True):
        first = row["step"] <= 4
        assert (row["block_loss"] > 0, row["contrastive_loss"] > 0, row["pair_matching_loss"] > 0) == (
            first,
            not first,
            not first,
        )
        assert kept == (row["step"] < 4)
    assert logged[3]["block_loss"] < 0.9 * logged[0]["block_loss"]


def test_a_run_of_this_term_alone(tmp_path, source):
    alone = [source, "loss.block_weight=1", "loss.contrastive_weight=0", "loss.pm_weight=0", "run.steps=30", "optim.lr=3e-3"]
    go(tiny.settings(tmp_path, *alone))
    values = [float(row["block_loss"]) for row in rows(tmp_path / "run")]
    assert values[-1] < 0.6 * values[0], values


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [[*FIRST, *LATER], ["loss.block_weight=1", "loss.base=sigmoid", "run.precision=bf16", "data.micro_batch=4"]]
)
@pytest.mark.parametrize("stop", [2, 5])
def test_it_resumes_bit_for_bit(tmp_path, source, monkeypatch, changes, stop):
    check_resumed(tmp_path, monkeypatch, stop, [source, *changes])


def test_resuming_needs_the_source_for_the_stage_alone(tmp_path, source):
    settings = partial(tiny.settings, tmp_path, source, *FIRST, *LATER)
    for name, steps in (("early", 2), ("late", 5)):
        go(settings(f"run.out={tmp_path / name}", f"run.steps={steps}"))
    (tmp_path / "original.pt").unlink()
    assert "step 7/7" in go(settings(f"run.out={tmp_path / 'late'}"), resume=True)
    message = (
        r"loss.block_weight: up to step 4 it needs the blocks of the original model: inherit.source: .* got .*original.pt"
    )
    with pytest.raises(ConfigError, match=message):
        go(settings(f"run.out={tmp_path / 'early'}"), resume=True)
    assert checkpoint.load(tmp_path / "early")["step"] == 2


@pytest.mark.parametrize("micro", ["4", "{image: 4, text: 6}", "{image: 8, text: 4}"])
@pytest.mark.parametrize("alone", [False, True])
def test_micro_batches_give_the_whole_batches_gradient(tmp_path, source, monkeypatch, micro, alone):
    off = ["loss.contrastive_weight=0", "loss.pm_weight=0"] if alone else []
    results = []
    for changes in ([], [f"data.micro_batch={micro}"]):
        common = [source, "inherit.train=[visual.trunk.fc_norm]", "data.captions_per_image=2", "loss.block_weight=1"]
        this, batches = started(tmp_path, *common, *off, *changes)
        nn.init.normal_(this.model.text.transformer.resblocks[0].qk.weight, std=0.05)
        monkeypatch.setattr(this.optimizer, "step", lambda: None)
        row = train.train_step(this, batches)
        results.append((row, {name: p.grad for name, p in this.model.named_parameters() if p.grad is not None}))
    (row, grads), (cached_row, cached) = results
    assert cached_row == pytest.approx(row, rel=1e-4)
    assert row["block_loss"] > 0.1
    assert grads.keys() == cached.keys()
    assert any("resblocks.0.fc1" in name for name in grads)
    for name, grad in grads.items():
        assert (grad - cached[name]).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


def test_the_student_starts_from_the_same_weights_with_and_without(tmp_path, source):
    plain, taught = (started(tmp_path, source, f"loss.block_weight={weight}")[0] for weight in (0, 1))
    torch.manual_seed(0)
    assert plain.distillation is None
    assert all(map(torch.equal, plain.model.state_dict().values(), taught.model.state_dict().values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["inherit.source=null"], "loss.block_weight: expected inherit.source, which has the blocks to learn from, got null"),
        (
            ["model.options.simplified=false"],
            "loss.block_weight: expected 0 for a model without simplified blocks, siclip-tiny, got one above 0",
        ),
        (
            [],
            "loss.block_weight: up to step 7 it needs the blocks of the original model: inherit.source: expected weights of "
            "the original's text.transformer.resblocks.0, got .*less.pt without",
        ),
    ],
)
def test_what_has_no_blocks_to_learn_from(tmp_path, source, changes, message):
    state = torch.load(tmp_path / "original.pt")
    torch.save({key: value for key, value in state.items() if "blocks" not in key}, tmp_path / "less.pt")
    with pytest.raises(ConfigError, match=message):
        go(tiny.settings(tmp_path, f"inherit.source={tmp_path / 'less.pt'}", "loss.block_weight=1", *changes))
    assert not (tmp_path / "run").exists()


def test_last_step_of_a_schedule():
    for schedule, last in (
        ({"value": 1}, 9), ({"value": 1, "until": 4}, 3), ({"value": 1, "to": 0, "end": 6}, 5), ({"value": 0}, -1),
        ({"value": 1, "start": 12}, -1), ({"value": 0, "to": 1}, 9),
    ):  # fmt: skip
        assert config.Schedule(**schedule).last(10) == last, schedule
