"""Training: that it learns, resuming bit for bit, other lengths, evaluation on the way, the log,
and refusals.
"""

import gc
import itertools
import re
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from simplclip import losses
from simplclip.common import progress
from simplclip.common.errors import InputError
from simplclip.models.trained import read_checkpoint
from simplclip.ops import backends
from simplclip.train import checkpoint, log, loop
from simplclip.train.config import ConfigError, load
from simplclip.train.log import Log
from simplclip.train.optimizer import learning_rate
from simplclip.train.resolve import resolve
from simplclip.train.setup import make_state
from simplclip.train.step import train_step
from support.data.pairs import digests, table
from support.train import tiny
from support.train.runs import at_step, bits, go, rows, state_of

pytestmark = pytest.mark.long


CPU = torch.device("cpu")


@pytest.mark.slow
def test_it_learns_and_leaves_everything_behind(tmp_path):
    changes = ["run.steps=40", "run.log_every=4", "optim.lr=2e-3", "data.augment=none"]
    config = tiny.settings(tmp_path, *changes, "data.samples=24")
    out = tmp_path / "run"
    text = go(config, curves=True)
    logged = rows(out)
    assert [int(r["step"]) for r in logged] == list(range(4, 41, 4))
    first, last = float(logged[0]["contrastive_loss"]), float(logged[-1]["contrastive_loss"])
    assert first > 1.5
    assert last < 0.6 * first
    for row in logged:
        terms = float(row["contrastive_loss"]) + float(row["pair_matching_loss"])
        assert float(row["loss"]) == pytest.approx(terms, 1e-5)
    assert Image.open(out / "curves.png").size[0] > 600
    assert load(out / "config.yaml") == config
    assert {p.name for p in out.iterdir()} == {
        ".lock",
        "config.yaml",
        "curves.png",
        "last.pt",
        "metrics.csv",
    }
    assert text.startswith("model      siclip-tiny: ")
    for words in (
        "parallel_mlp by cpu, shaped_attention by cpu, similarity_loss by cpu\n",
        "precision fp32 (as configured)",
        "24 images, 1 caption drawn of each; 3.0 steps an epoch, 13.3 epochs",
        f"CPU threads: {torch.get_num_threads()}",
        "step 40/40",
        " gone, ",
        "samples/s",
        "MiB",
    ):
        assert words in text
    state = torch.load(out / "last.pt", weights_only=True)
    fresh = losses.ClipPMLoss()
    assert any(not torch.equal(state["loss"][k], v) for k, v in fresh.state_dict().items()), (
        "the plane did not train"
    )


@pytest.mark.slow
def test_the_log_names_the_backends_that_ran(tmp_path, monkeypatch):
    def why_not(device, dtype, facts):
        return "is for texts" if facts.length == 9 else None

    row = backends.TABLE["shaped_attention"]["cpu"]._replace(why_not=why_not)
    monkeypatch.setitem(backends.TABLE["shaped_attention"], "cpu", row)
    text = go(tiny.settings(tmp_path, "run.steps=1"))
    assert "ops        parallel_mlp by cpu, shaped_attention by cpu and sdpa, simil" in text


@pytest.mark.slow
def test_evaluating_on_the_way_does_not_change_the_run(tmp_path, monkeypatch):
    held = tiny.write_shard(tmp_path / "data" / "held.tar")
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'plain'}", "run.steps=4"), curves=True)
    drawn = mock.Mock(side_effect=log.write_curves)
    monkeypatch.setattr(log, "write_curves", drawn)
    changes = [f"run.out={tmp_path / 'seen'}", "eval.every=3", f"eval.splits.held={held}"]
    text = go(tiny.settings(tmp_path, *changes, "run.steps=4"), curves=True)
    assert drawn.call_count == 3  # evaluations, and the end
    assert bits(state_of(tmp_path / "plain")["model"]) == bits(state_of(tmp_path / "seen")["model"])
    seen = rows(tmp_path / "seen", "evaluation.csv")
    assert [r["step"] for r in seen] == ["3", "3", "4", "4"]
    assert {r["direction"] for r in seen} == {"image_to_text", "text_to_image"}
    assert all(r["split"] == "held" and 0 <= float(r["R@5"]) <= 1 for r in seen)
    assert re.search(r"evaluation held text to image: R@1 \d+\.\d% \(chance \d+\.\d%\)", text)
    plain, more = (Image.open(tmp_path / name / "curves.png") for name in ("plain", "seen"))
    assert more.height > plain.height, "its last row has R@k over the steps"


@pytest.mark.slow
def test_the_pictures_of_evaluations_do_not_pile_up(tmp_path):
    held = tiny.write_shard(tmp_path / "data" / "held.tar")
    gc.collect()
    gc.disable()
    try:
        changes = ["run.steps=3", "eval.every=1", f"eval.splits.held={held}"]
        go(tiny.settings(tmp_path, *changes), curves=True)
        figures = sum(isinstance(thing, Figure) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert figures == 1, "the one that is drawn at the end"


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=2")
    assert "has no checkpoint yet: starting at step 0" in go(config, resume=True)
    before = digests(tmp_path / "run")
    with pytest.raises(
        ConfigError,
        match="run.out: expected a folder without a run, got .*; continue that run by --resume",
    ):
        go(config)
    assert digests(tmp_path / "run") == before
    assert "done       step 2" in go(config, resume=True)  # all steps are done
    after = digests(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["metrics.csv"] == before["metrics.csv"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run.out: expected a folder, got the file"):
        go(tiny.settings(tmp_path, f"run.out={tmp_path / 'file'}"))


@pytest.mark.slow
def test_epochs_and_tables(tmp_path, capsys):
    """A table is packed into the run's folder, and read from there again."""
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for colour, shape in itertools.product(tiny.COLOURS, tiny.SHAPES):
        (images / f"{colour}-{shape}.png").write_bytes(tiny.picture(tiny.COLOURS[colour], shape))
        lines.append([f"images/{colour}-{shape}.png", f"{colour} {shape}"])
    table(tmp_path / "t.csv", lines)
    changes = [f"data.train={tmp_path / 't.csv'}"]
    out = tmp_path / "run"
    text = go(tiny.settings(tmp_path, *changes, "run.epochs=1", "run.save_every=1"))
    packed = f"packed 24 samples of t.csv in 1 shard, {out / 'shards' / 't' / '*.tar'}"
    assert packed in capsys.readouterr().out
    assert "24 images, 1 caption drawn of each; 3.0 steps an epoch, 1.0 epochs" in text
    stored = load(out / "config.yaml")
    assert (stored.run.steps, stored.run.epochs) == (3, None)
    for config, steps in (
        (tiny.settings(tmp_path, *changes, "run.epochs=2"), 6),
        (stored.replaced(run={"steps": 7}), 7),
    ):
        go(config, resume=True)
        assert read_checkpoint(out)["step"] == steps

    for epochs, size, samples, held_out, expected in (
        (0.5, 7, "null", 0, 2),
        (0.01, 8, "null", 0, 1),
        (2, 8, 80, 0, 20),
        (2, 8, "null", 0.5, 3),
    ):
        changes = [f"run.epochs={epochs}", f"data.batch_size={size}", f"data.samples={samples}"]
        changes.append(f"eval.hold_out={held_out}")
        changes.append(f"data.train={out}/shards/t/*.tar")
        resolved = resolve(tiny.settings(tmp_path, *changes), None, Console())
        assert resolved.config.run.steps == expected, changes
    torch.save({"x": torch.zeros(1)}, tmp_path / "no-clip.pt")
    no_clip = f"inherit.source={tmp_path / 'no-clip.pt'}"
    for change in (no_clip, "eval.every=2"):
        changes = [f"data.train={tmp_path / 't.csv'}", f"run.out={tmp_path / 'wrong'}", change]
        with pytest.raises(InputError):
            go(tiny.settings(tmp_path, *changes, "data.batch_size=9"))
        assert not (tmp_path / "wrong").exists(), "packed before the model was checked"
    with pytest.raises(
        ConfigError, match="the number of samples N, for run.epochs, by --set data.samples=N, got"
    ):
        go(tiny.settings(tmp_path, "run.epochs=1", f"run.out={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()
    text = go(tiny.settings(tmp_path, "run.steps=1", f"run.out={tmp_path / 'other'}"))
    assert "not known without a meta.json: --set data.samples=N tells it" in text


def test_learning_rate(tmp_path):
    config = tiny.settings(tmp_path, "run.steps=110", "optim.warmup=10", "optim.lr=2.0")
    rates = [learning_rate(config, step) for step in range(111)]
    assert [rates[step] for step in (0, 9, 10, 60, 110)] == pytest.approx([0.2, 2, 2, 1, 0.0])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_only_matrices_decay_and_the_scale_is_held_below_100(tmp_path):
    config = tiny.settings(tmp_path, "optim.weight_decay=0.3", "optim.warmup=0")
    state = make_state(config, CPU, "fp32")
    decayed, rest = state.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    loss = state.objective.loss
    names = {id(p): n for n, p in [*state.model.named_parameters(), *loss.named_parameters()]}
    kept = {names[id(p)] for p in rest["params"]}
    assert "logit_scale" in kept
    assert {n for n, _ in loss.named_parameters()} <= kept
    assert all(n in kept for n in names.values() if "norm" in n or "bias" in n or "alpha" in n)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept) == len(names)

    with torch.no_grad():
        state.model.logit_scale.fill_(9.0)
    loader = loop.make_loader(state)
    train_step(state, [next(iter(loader))])
    assert state.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_model_of_which_only_the_scale_trains(tmp_path):
    changes = [
        "model.options.simplified=false",
        f"inherit.source={tmp_path / 'a.pt'}",
        "loss.pm_weight=0",
    ]
    source = make_state(tiny.settings(tmp_path, changes[0]), CPU, "fp32").model
    torch.save(source.state_dict(), tmp_path / "a.pt")
    state = make_state(tiny.settings(tmp_path, *changes), CPU, "fp32")
    assert [len(group["params"]) for group in state.optimizer.param_groups] == [0, 1]


@pytest.mark.slow
def test_lines_by_time_and_a_checkpoint_after_some_minutes(tmp_path, monkeypatch):
    """A step takes 20 seconds of this clock."""
    save = mock.Mock(side_effect=checkpoint.save)
    monkeypatch.setattr(checkpoint, "save", save)

    class Clock:
        now = 0.0
        monotonic = staticmethod(lambda: Clock.now)
        perf_counter = staticmethod(lambda: Clock.now)

    for module in (checkpoint, log, loop, progress):
        monkeypatch.setattr(module, "time", Clock)
    for step in range(1, 8):
        at_step(monkeypatch, step, lambda: setattr(Clock, "now", Clock.now + 20))
    monkeypatch.setattr(loop, "SAVE_MINUTES", 1)
    text = go(tiny.settings(tmp_path, "optim.warmup=9"))
    assert [call.args[1]["step"] for call in save.call_args_list] == [4, 7]
    assert re.findall(r"^step (\d)/7  (.*?)  loss", text, re.M)[0] == (
        "1",
        "0:00:20 gone, 0:02:00 left",
    )
    assert f"done       step 7 in 0:02:20: {tmp_path / 'run' / 'last.pt'}" in text
    assert "warning    optim.warmup = 9 is longer than the run" in text


def test_csv_of_a_run_keeps_its_columns_and_the_last_row_of_a_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "m.csv").write_text("step,loss\n1,0.5\n2,0.7\n3,")
    state = make_state(tiny.settings(tmp_path), CPU, "fp32")
    lines = Log(state, Console())
    for step in (2, 3):
        lines.write("m", {"step": step, "loss": 0.25, "new": 1})
    path = tmp_path / "run" / "m.csv"
    assert path.read_text() == "step,loss\n1,0.5\n2,0.7\n3,\n2,0.25\n3,0.25\n"
    figures = log.read_figures(path)
    assert [(row["step"], row["loss"]) for row in figures] == [
        ("1", "0.5"),
        ("2", "0.25"),
        ("3", "0.25"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "optim.options.betas=[0.9]",
            "optim.options: expected arguments of torch.optim.AdamW, got {.*'betas': .0.9",
        ),
        ("model.options.depth=3", "model.options"),
        (
            "model.options.text_cfg.layers=0",
            "model.options: expected options of siclip-tiny, got .*'layers': 0",
        ),
        (
            "inherit.train=['*']",
            "inherit.source: expected weights, for inherit.train and inherit.blocks, got none",
        ),
        ("eval.every=2", "eval.splits: expected held-out data, for eval.every = 2, got none"),
    ],
)
def test_what_does_not_fit_is_one_error_and_leaves_nothing(tmp_path, change, message):
    out = tmp_path / "new" / "run"
    with pytest.raises(Exception, match=message):
        go(tiny.settings(tmp_path, change, f"run.out={out}"))
    assert not out.parent.exists()
