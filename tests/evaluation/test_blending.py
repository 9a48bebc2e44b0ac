"""Weights between a run's start and the run: `evaluate --blend` and `export --blend`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import simplclip
from simplclip import evaluation, models
from simplclip.common.errors import InputError
from simplclip.models.trained import load_model, read_checkpoint
from simplclip.train.setup import load_start, make_state
from support.data.pairs import write
from support.programs import call, one_line
from support.train import tiny
from support.train.runs import bits, go

pytestmark = pytest.mark.long

LABELLED = [("labels", "zero_shot")]
LABELS = ("--data", "labels=labels.tar")
TEXT = tiny.MODEL
CPU = ("--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Makes a run with averages in runs/tuned, started in the folder from base/; its best.pt is of
    step 3. It evaluates the splits held_out and one.
    """
    folder = tmp_path_factory.mktemp("blend")
    shutil.copytree(trained, folder / "base")
    tiny.write_shard(folder / "one.tar")
    image = {name: tiny.picture(colour, "ring") for name, colour in tiny.COLOURS.items()}
    labelled = [
        (f"{name}-{copy}", {"png": image[name], "json": json.dumps({"label": name}).encode()})
        for copy in range(2)
        for name in image
    ]
    write(folder / "labels.tar", labelled)
    changes = ["model.checkpoint=base", "run.out=runs/tuned", "optim.lr=5e-3", "optim.ema=0.5"]
    changes += ["eval.hold_out=0.25", "eval.splits={one: one.tar}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        go(tiny.settings(folder, *changes))
    run = folder / "runs" / "tuned"
    best = torch.load(run / "last.pt")
    averages = {name: 0.9 * value for name, value in best["ema"].items()}
    torch.save(best | {"step": 3, "ema": averages}, run / "best.pt")
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Draws no contact sheets, which takes longer than the figures."""
    monkeypatch.setattr("simplclip.evaluation.run.write_sheet", lambda *_: None)


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def weights_of(run):
    return load_model(run)[0].state_dict()


def evaluated(*words):
    """Runs `evaluate --blend`; returns its results and its text."""
    result = call("evaluate", *words, "--blend", *CPU, "--out", "out")
    assert result.exit_code == 0, result.output
    with open("out/blend.json") as file:
        return json.load(file), result.output


def test_the_sum_is_that_of_float64_and_ends_are_exact():
    random = torch.Generator().manual_seed(0)
    same = torch.cat([torch.tensor([float("inf")]), torch.randn(100, generator=random)])
    start, end = (
        {
            "a": torch.randn(50, 3, generator=random)[:, :2],
            "half": torch.randn(9, generator=random).half(),
            "odd": torch.tensor(odd),
            "same": same.clone(),
            "count": torch.tensor(count),
        }
        for count, odd in ((3, [-0.0, 1.0, float("nan")]), (8, [1.0, float("inf"), 2.0]))
    )
    for alpha, wanted in ((0, start), (1, end), (0.0, start), (1.0, end)):
        floats = {name: value for name, value in wanted.items() if name != "count"}
        blended = evaluation.blend(start, end, alpha)
        assert blended.pop("count") == 8
        assert bits(blended) == bits(floats)
    blended = evaluation.blend(start, end, 0.3)
    assert bits(blended["same"]) == bits(same)
    for name, error in (("a", 2e-7), ("half", 2**-10)):
        exact = 0.7 * start[name].double() + 0.3 * end[name].double()
        assert blended[name].dtype == end[name].dtype
        torch.testing.assert_close(blended[name].double(), exact, rtol=error, atol=error)
    for alpha in (1.5, -0.1, float("nan"), "0.5", None):
        with pytest.raises(InputError, match="alpha: expected a number from 0 to 1, got "):
            evaluation.blend(start, end, alpha)
    for other in ({"a": end["a"]}, end | {"half": end["half"][:1]}, end | {"more": end["a"]}):
        with pytest.raises(InputError, match="start: expected the names and shapes of end, got"):
            evaluation.blend(start, other, 0.5)


@pytest.mark.slow
def test_both_ends_have_the_figures_of_evaluate_and_the_best_mean_is_named(inside):
    data = ("--data", "one=one.tar", *LABELS)
    results, text = evaluated("runs/tuned", *LABELS)
    rows = results["rows"]
    assert list(rows[0]["splits"]) == ["one", "held_out", "labels"]
    assert call("evaluate", "runs/tuned", "base", *data, *CPU, "--out", "out").exit_code == 0
    with open("out/evaluation.json") as file:
        ends = json.load(file)
    assert [row["alpha"] for row in rows] == [tenths / 10 for tenths in range(11)]
    start = ends["baselines"]["base"]
    for row, end in ((rows[-1], ends), (rows[0], start)):
        for name, key in (("one", "image_to_text"), ("one", "text_to_image"), *LABELLED):
            assert row["splits"][name][key] == end["splits"][name][key]
    assert ends["splits"]["one"]["image_to_text"] != start["splits"]["one"]["image_to_text"]
    for row in rows:
        shares = []
        for name in ("one", "held_out"):
            ways = (row["splits"][name][way] for way in ("image_to_text", "text_to_image"))
            shares.append(sum(way["R@1"]["value"] for way in ways) / 2)
        shares.append(row["splits"]["labels"]["zero_shot"]["top1"]["value"])
        assert row["mean"] == pytest.approx(sum(shares) / 3)
        one, held, labels, mean = (f"{value:.1%}" for value in (*shares, row["mean"]))
        line = f"one {one}, held_out {held}, labels {labels}, mean {mean}\n"
        assert f"alpha {row['alpha']}: first answers right: {line}" in text
    highest = max(row["mean"] for row in rows)
    assert results["best"] == min(row["alpha"] for row in rows if row["mean"] == highest)
    assert f"best for the mean: alpha {results['best']}, {highest:.1%}\n" in text
    assert "start: base; run: runs/tuned/best.pt, step 3\n" in text
    assert text.count("samples read") == 3
    about = [results[key] for key in ("checkpoint", "start", "step")]
    assert about == ["runs/tuned/best.pt", "base", 3]


@pytest.mark.slow
def test_a_moved_run_evaluates_its_splits_between_the_start_and_its_last_step(inside, monkeypatch):
    monkeypatch.setattr("simplclip.evaluation.blending.ALPHAS", (0.0, 0.3))
    shutil.copytree("runs/tuned", "moved")
    results, _ = evaluated("moved", "--last")
    assert list(results["rows"][0]["splits"]) == ["one", "held_out"]
    assert (results["checkpoint"], results["step"]) == ("moved/last.pt", 7)
    assert results["rows"] == evaluated("runs/tuned", "--last")[0]["rows"]
    assert results["rows"][1] != evaluated("runs/tuned")[0]["rows"][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["model.checkpoint=runs/tuned", "model.image_size=32", "model.context_length=20"],
        ["inherit.source=[base/last.pt]", "inherit.train=[text.transformer]"],
        ["model.checkpoint=base", "loss.base=sigmoid"],
    ],
    ids=["best-and-resized", "inherited", "bias"],
)
def test_a_start_is_made_again_from_the_config(inside, tmp_path, changes):
    config = tiny.settings(tmp_path, *changes)
    wanted = make_state(config, torch.device("cpu"), "fp32").model.state_dict()
    source, weights = load_start(tmp_path / "run" / "last.pt", {"config": config.to_dict()})
    assert bits(dict(weights)) == bits(dict(wanted))
    assert source == f"{changes[0].partition('=')[2].strip('[]')}, not known to be unchanged"


@pytest.mark.slow
def test_other_weights_at_the_path_of_the_start_are_refused_by_name(inside):
    commands = [("evaluate", "runs/tuned", "--blend", "--data", "one.tar")]
    commands.append(("export", "runs/tuned/best.pt", "--out", "new", "--blend", "0.5"))
    kept = torch.load("base/last.pt")
    name = "text.token_embedding.weight"
    try:
        for change in ({"step": 99}, {"model": kept["model"] | {name: kept["model"][name] + 0.1}}):
            torch.save(kept | change, "base/last.pt")
            for file in ("best", "last"):
                state = read_checkpoint(f"runs/tuned/{file}.pt")
                if "step" in change:
                    assert load_start("run", state)[0] == "base"
                    continue
                with pytest.raises(InputError, match=f"others in base, of {name} first"):
                    load_start("run", state)
        for words in commands:
            line = one_line(*words)
            assert "expected the weights from which runs/tuned/best.pt started, got oth" in line
    finally:
        torch.save(kept, "base/last.pt")


@pytest.mark.slow
def test_a_run_without_a_start_of_its_architecture_is_refused_before_the_data(inside, tmp_path):
    def line_of(*changes):
        values = tiny.settings(tmp_path, *changes).to_dict()
        state = torch.load("base/last.pt")
        torch.save(state | {"config": values}, tmp_path / "run.pt")
        return one_line("evaluate", tmp_path / "run.pt", "--blend", "--data", "one.tar")

    def config_of(*changes):
        return {"config": tiny.settings(tmp_path, *changes).to_dict()}

    new = "blend: expected a run that starts from trained weights of its own architecture, got "
    other = "model.options.text_cfg={layers: 2, width: 64, heads: 2}"
    scratch = one_line("evaluate", "base", "--blend", "--data", "one.tar")
    assert f"{new}base, in which 62 tensors, visual." in scratch
    with pytest.raises(InputError, match="12 tensors, text.transformer.resblocks.1"):
        load_start("run.pt", config_of("model.checkpoint=base", other))
    plain = models.create("siclip-tiny", simplified=False, vision_cfg={"image_size": 24}, **TEXT)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    average = [f"inherit.source={tmp_path / 'plain.pt'}", "inherit.blocks=average"]
    for start in ([], ["model.checkpoint=base"]):
        with pytest.raises(InputError, match="whose blocks start by inherit.blocks"):
            load_start("run.pt", config_of(*start, *average))
    for change, error in (
        ("model.checkpoint=gone", "model.checkpoint: expected a file of weights, got no such file"),
        (
            "inherit.source=[base, no.pt]",
            "inherit.source: expected a file of weights, got no such file: no",
        ),
    ):
        started = f"blend: expected the weights from which {tmp_path / 'run.pt'} started, got "
        assert started + error in line_of(change)
    torch.save(models.create("siclip-tiny").state_dict(), tmp_path / "w.pt")
    for names in (["base", "runs/tuned"], [f"siclip-tiny/{tmp_path / 'w.pt'}"]):
        line = one_line("evaluate", *names, "--blend", "--data", "one.tar")
        assert f"--blend: expected one run or checkpoint, got {', '.join(names)}" in line
    assert call("export", "runs/tuned", "--out", "new", "--blend", "1.5").exit_code == 2
    assert f"{new}base, in" in one_line("export", "base", "--out", "new", "--blend", "0.5")


@pytest.mark.slow
def test_an_export_has_the_blended_weights_and_their_figures(inside, tmp_path, monkeypatch):
    monkeypatch.setattr("simplclip.evaluation.blending.ALPHAS", (0.0, 0.3, 1.0))
    results, _ = evaluated("runs/tuned", "--data", "one=one.tar")
    shutil.copy("out/blend.json", "runs/tuned")

    def exported(alpha, *options):
        out = tmp_path / f"{alpha}{''.join(options)}"
        result = call("export", "runs/tuned", "--out", out, "--blend", alpha, *options)
        assert result.exit_code == 0, result.output
        about = json.loads((out / "export.json").read_text())
        assert about["blend"] == {"alpha": alpha, "start": "base"}
        card = (out / "README.md").read_text()
        told = f"These weights are {alpha} of the training's and 1 - {alpha} of its start, base.\n"
        assert told in card
        assert told in result.output
        return out, card

    start, best, last = (weights_of(run) for run in ("base", "runs/tuned", "runs/tuned/last.pt"))
    out, card = exported(0.3)
    wanted = evaluation.blend(start, best, 0.3)
    assert bits(load_file(out / "open_clip_model.safetensors")) == bits(wanted)
    share = results["rows"][1]["splits"]["one"]["image_to_text"]["R@1"]["value"]
    assert f"- one, image to text R@1: {share:.1%} (chance 4.2%)" in card
    model, _ = load_model("runs/tuned")
    model.load_state_dict(wanted)
    pixels = torch.rand(2, 3, 24, 24)
    features = simplclip.load(out).model.encode_image(pixels)
    assert torch.equal(features, model.encode_image(pixels))
    out, card = exported(0.0)
    assert bits(load_file(out / "open_clip_model.safetensors")) == bits(dict(start))
    assert "- one, text to image R@1: " in card
    for words in ([0.25], [0.3, "--last"]):  # others than were evaluated
        out, card = exported(*words)
        assert "The weights had not been evaluated before the export: " in card
    last_blend = evaluation.blend(start, last, 0.3)
    assert bits(load_file(out / "open_clip_model.safetensors")) == bits(last_blend)
