"""A run that holds out a share of its data: what trains, what is evaluated, resuming, the best
weights.
"""

import io
import json
import os
import signal
from unittest import mock

import open_clip
import pytest
import torch
from PIL import Image

import simplclip
from simplclip import data, evaluation
from simplclip.common.errors import InputError
from simplclip.models.trained import read_checkpoint
from simplclip.train import checkpoint
from simplclip.train.config import ConfigError, load
from simplclip.train.evaluate import Interrupted
from support.data.pairs import digests, members, table, write
from support.programs import call, forked, one_line
from support.train import tiny
from support.train.runs import at_step, bits, check_ends_as, go, rows, state_of

HELD = ("eval.hold_out=0.4", "eval.every=3", "optim.ema=0.5", "run.save_every=3")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Writes a shard, a run in `whole` that evaluates what it holds out, and what it printed."""
    folder = tmp_path_factory.mktemp("held")
    with mock.patch.object(checkpoint, "save", side_effect=checkpoint.save) as save:
        text = go(tiny.settings(folder, *HELD, f"run.out={folder / 'whole'}"))
    states = [call.args[1] for call in save.call_args_list if len(call.args) == 2]  # of last.pt
    written = [(state["step"], state["evaluated"]) for state in states]
    assert written == [(3, 0), (3, 3), (6, 3), (6, 6), (7, 6), (7, 7)]  # around each evaluation
    (folder / "printed").write_text(text)
    return folder


@pytest.fixture
def no_sheets(monkeypatch):
    """Leaves out the sheets of `simplclip evaluate`, which take long."""
    monkeypatch.setattr("simplclip.evaluation.run.write_sheet", lambda *_: None)


def held_keys(run):
    split = data.held_out(load(run / "config.yaml").held_out["held_out"])
    return [
        sample["__key__"]
        for source in split.sources
        for sample in split._read(source, data.Skipped())
    ]


@pytest.mark.slow
def test_a_run_says_what_it_holds_out(undisturbed):
    text, held = (undisturbed / "printed").read_text(), len(held_keys(undisturbed / "whole"))
    assert 4 <= held <= 16
    assert "held out   eval.hold_out=0.4 of all images" in text
    evaluated = rows(undisturbed / "whole", "evaluation.csv")
    assert {row["split"] for row in evaluated} == {"held_out"}


@pytest.mark.slow
def test_what_is_held_out_stays_so_and_is_evaluated(tmp_path, request):
    # eval.every=0: for `evaluate` alone
    go(tiny.settings(tmp_path, "eval.hold_out=0.4", "run.steps=2"))
    go(tiny.settings(tmp_path, "eval.hold_out=0.4", "eval.every=3", "run.steps=3"), resume=True)
    text = output("evaluate", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert f"held_out: {len(held_keys(tmp_path / 'run'))} samples read, 0 skipped" in text
    assert (tmp_path / "run/evaluation-held_out.png").exists()
    table(tmp_path / "t.csv", [(tmp_path / f"{i}.png", f"a {i}") for i in range(20)])
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(tiny.picture((i, 9 * i, 99), "ring"))
    changes = [f"data.train={tmp_path / 't.csv'}", f"run.out={tmp_path / 'packed'}"]
    go(tiny.settings(tmp_path, *HELD, *changes, "run.steps=1"))
    other = tiny.write_shard(tmp_path / "other.tar")
    file = tmp_path / "run/config.yaml"
    shard = str(tmp_path / "data/train-0.tar")
    file.write_text(file.read_text().replace(shard, f"pipe:cat {other}"))
    assert "expected local files in the eval.splits of " in one_line("evaluate", tmp_path / "run")


def means(run):
    """Returns the mean R@1 of each evaluation by its step."""
    values = {}
    for row in rows(run, "evaluation.csv"):
        values.setdefault(int(row["step"]), []).append(float(row["R@1"]))
    return {step: sum(several) / len(several) for step, several in values.items()}


SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "layers": 1, "width": 32, "heads": 2},
}


@pytest.mark.slow
def test_best_weights_in_plain_open_clip_have_the_figures_of_the_log(tmp_path, no_sheets):
    """Averaged weights load without simplclip; the high rate makes them worse at the end."""
    run, splits = tmp_path / "run", {"seen": tiny.write_shard(tmp_path / "seen.tar")}
    changes = [
        f"model={json.dumps({'name': 'open_clip:ViT-B-32', 'options': SMALL})}",
        "optim.ema=0.5",
        "optim.lr=0.03",
        f"eval.splits={json.dumps(splits)}",
        "eval.hold_out=0.4",
        "eval.every=2",
        "run.steps=14",
        "loss.pm_weight=0",
        "run.precision=bf16",
    ]
    text = go(tiny.settings(tmp_path, *changes))
    by_step = means(run)
    best = max(by_step, key=lambda step: (by_step[step], -step))
    assert best < 14, "the test needs a run that gets worse"
    assert f"best       mean R@1 {by_step[best]:.1%}, of step {best}: {run / 'best.pt'}" in text
    assert f"best       step {best}: mean R@1 {by_step[best]:.1%}, in {run / 'best.pt'}" in text
    assert state_of(run, "best.pt")["recall"] == by_step[best]
    assert not {"optimizer", "ema"} & state_of(run, "best.pt").keys()

    source = f"weights: {run}/best.pt, of the best evaluation, step {best}; --last takes last.pt"
    assert source in output("export", run, "--out", tmp_path / "export")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")
    logged = {
        (row["split"], row["direction"]): row
        for row in rows(run, "evaluation.csv")
        if int(row["step"]) == best
    }
    held = held_keys(run)
    every = files_of(splits["seen"])
    for split, keys in (("seen", every), ("held_out", held)):
        pictures = {key: files for key, files in every.items() if key in keys}
        with torch.no_grad():
            model.eval()
            images = [Image.open(io.BytesIO(files["png"])) for files in pictures.values()]
            captions = [json.loads(files["json"])["captions"][0] for files in pictures.values()]
            x = model.encode_image(torch.stack([*map(preprocess, images)]), normalize=True)
            y = model.encode_text(words(captions), normalize=True)
        for direction, scores in (("image_to_text", x @ y.T), ("text_to_image", y @ x.T)):
            right = (scores.argmax(1) == torch.arange(len(scores))).sum().item()
            assert float(logged[split, direction]["R@1"]) == right / len(scores)

    printed = output("evaluate", run, "--device", "cpu", "--workers", 0)
    assert source in printed
    figures = json.loads((run / "evaluation.json").read_text())
    assert (figures["step"], figures["checkpoint"]) == (best, f"{run}/best.pt")
    assert {
        (split, way): values[way]["R@1"]["value"]
        for split, values in figures["splits"].items()
        for way in (*WAYS,)
    } == {place: float(row["R@1"]) for place, row in logged.items()}
    assert f"from {run}/best.pt: features" in repr(simplclip.load(run, device="cpu"))
    assert "weights:" not in output("evaluate", run, "--last", "--device", "cpu", "--workers", 0)
    assert json.loads((run / "evaluation.json").read_text())["step"] == 14
    output("export", run, "--last", "--out", tmp_path / "export", "--force")
    assert simplclip.load(tmp_path / "export").step == 14
    report = simplclip.inherit(simplclip.create_model("open_clip:ViT-B-32", **SMALL), run)
    assert report.sources == [f"{run}/best.pt"]


WAYS = ("image_to_text", "text_to_image")


def output(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def files_of(shard):
    files = {}
    for name, content in members(shard).items():
        key, _, suffix = name.partition(".")
        files.setdefault(key, {})[suffix] = content
    return files


@pytest.mark.slow
@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.prove), 7])
def test_a_signal_ends_an_evaluation_after_the_running_batch(
    tmp_path, monkeypatch, undisturbed, step
):
    """In the middle and at the end of a run; what is trained is saved before the evaluation."""
    config = tiny.settings(undisturbed, *HELD, f"run.out={tmp_path / 'parts'}")
    original = evaluation.Encoder.features
    batches = []

    def features(towers, *inputs):
        saved = read_checkpoint(tmp_path / "parts/last.pt")
        if saved["step"] == step:
            assert saved["evaluated"] < step
            batches.append(inputs[0])
            os.kill(os.getpid(), signal.SIGTERM)
        return original(towers, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Encoder, "features", features)
        for resume in (False, True):
            with pytest.raises(Interrupted, match=f"SIGTERM: saved step {step} of 7 .* --resume"):
                go(config, resume=resume)
    assert batches == ["image", "image"], "the texts of the split come after its image"
    whole = undisturbed / "whole"
    check_ends_as(whole, config)
    assert rows(whole, "evaluation.csv") == rows(tmp_path / "parts", "evaluation.csv")
    assert bits(state_of(whole, "best.pt")) == bits(state_of(tmp_path / "parts", "best.pt"))


@pytest.mark.slow
def test_best_weights_stay_unless_a_better_evaluation_comes(tmp_path, monkeypatch):
    recalls = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.125, 5: 0.75, 6: 0.125, 7: 0.0625}
    kept = []
    original = checkpoint.Snapshot.keep_best
    monkeypatch.setattr(
        checkpoint.Snapshot,
        "keep_best",
        lambda self, _, samples: (
            original(self, recalls[self.state.step], samples) and kept.append(self.state.step)
        ),
    )
    changes = ["eval.hold_out=0.4", "eval.every=1"]
    go(tiny.settings(tmp_path, *changes, "run.steps=3"))
    before = digests(tmp_path / "run")["best.pt"]
    assert kept == [1, 2]
    go(tiny.settings(tmp_path, *changes, "run.steps=4", "optim.lr=0.1"), resume=True)
    assert digests(tmp_path / "run")["best.pt"] == before
    other = tiny.write_shard(tmp_path / "other.tar")
    go(tiny.settings(tmp_path, *changes, "run.steps=5"), resume=True)
    assert kept == [1, 2, 5]
    changes.append(f"eval.splits.other={other}")
    text = go(tiny.settings(tmp_path, *changes, "run.steps=6"), resume=True)
    assert kept == [1, 2, 5, 6], "figures of other splits cannot be compared"
    mark = "other held-out samples than those of step 5, whose mean R@1 of 75.0% counts no more"
    assert f"best       {mark}\n" in text
    assert state_of(tmp_path / "run")["best"]["recall"] == 0.125
    # the same names and captions, but other and larger pictures
    samples = [
        (key, files | {"png": tiny.picture((9, 9, 9), key) + bytes(1000)})
        for key, files in files_of(tmp_path / "data/train-0.tar").items()
    ]
    (tmp_path / "more").mkdir()
    changes.append(f"data.train={write(tmp_path / 'more/train-0.tar', samples)}")
    text = go(tiny.settings(tmp_path, *changes, "run.steps=7"), resume=True)
    assert kept == [1, 2, 5, 6, 7], "figures of other pictures cannot be compared"
    assert "or eval.hold_out were others: the epoch starts again" in text
    assert "other held-out samples than those of step 6, whose" in text


@pytest.mark.slow
def test_tensorboard_has_each_step_once_and_changes_nothing(tmp_path, monkeypatch, undisturbed):
    """Killed after a checkpoint and an evaluation that came later."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch.utils.tensorboard")  # imported once, for both forks
    changes = [*HELD, "run.save_every=2", "run.tensorboard=true"]
    whole = undisturbed / "whole"
    parts = tiny.settings(undisturbed, *changes, f"run.out={tmp_path / 'parts'}")
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert forked(lambda: go(parts)) == -signal.SIGKILL  # in forks, which have one thread
    assert forked(lambda: go(parts, resume=True)) == 0
    states = [state_of(run) for run in (whole, tmp_path / "parts")]
    for key in ("model", "optimizer"):
        assert bits(states[0][key]) == bits(states[1][key])
    assert rows(whole) == rows(tmp_path / "parts")
    board = accumulator.EventAccumulator(str(tmp_path / "parts/tensorboard"))
    board.Reload()
    logged = rows(tmp_path / "parts")
    losses = board.Scalars("metrics/loss")
    assert [event.step for event in losses] == [int(row["step"]) for row in logged]
    assert [event.value for event in losses] == pytest.approx(
        [float(row["loss"]) for row in logged], rel=1e-6
    )
    tag = "evaluation/held_out/image_to_text/R@1"
    assert [event.step for event in board.Scalars(tag)] == [3, 6, 7]
    images = board.Images("evaluation/held_out")
    assert [image.step for image in images] == [3, 6, 7]
    assert Image.open(io.BytesIO(images[0].encoded_image_string)).width == 800
    assert not (whole / "tensorboard").exists()


def test_shares_and_names_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="eval.hold_out: Input should be less than 1, got 1"):
        tiny.settings(tmp_path, "eval.hold_out=1")
    with pytest.raises(ConfigError, match="eval: splits: expected another name than held_out"):
        tiny.settings(tmp_path, "eval.hold_out=0.1", "eval.splits.held_out=x.tar")
    message = "eval.splits.held_out: expected at least 2 usable samples, got 1"
    with pytest.raises(InputError, match=message):
        go(tiny.settings(tmp_path, "eval.hold_out=0.04", "eval.every=1"))
    assert not (tmp_path / "run").exists()


def test_of_one_held_out_image_nothing_can_be_told(tmp_path):
    """Its R@1 is 100 % with any weights. A broken sample does not count."""
    files = {"png": tiny.picture((0, 0, 0), "bar"), "txt": b"a bar"}
    broken = {"png": b"", "txt": b"none"}
    one = write(tmp_path / "one.tar", [("a", broken), ("b", files), ("c", broken)])
    changes = ("eval.every=3", f"eval.splits.one={one}")
    message = (
        "eval.splits.one: expected at least 2 usable samples, got 1; 2 skipped: 2 not an image"
    )
    with pytest.raises(InputError, match=message):
        go(tiny.settings(tmp_path, *changes))
    assert not (tmp_path / "run").exists()
