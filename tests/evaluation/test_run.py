"""`simplclip evaluate`: several models and splits, what is written, what is refused."""

import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from simplclip import evaluation
from simplclip.evaluation import run as running
from simplclip.models.trained import read_checkpoint
from support.data.pairs import write
from support.models.open_clip_models import write_models
from support.programs import call, one_line
from support.train import tiny

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Makes a run with other weights, weights of an open_clip model, and two splits: each concept
    once, and twice.
    """
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    state = read_checkpoint(trained)
    generator = torch.Generator().manual_seed(0)
    state["model"] = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator).to(v.dtype)
        for k, v in state["model"].items()
    }
    torch.save(state, folder / "other.pt")
    tiny.write_shard(folder / "one.tar")
    tiny.write_shard(folder / "two.tar", copies=2)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Draws no pictures, which takes longer than the figures."""
    monkeypatch.setattr(running, "write_sheet", lambda *_: None)


@pytest.fixture
def evaluate(folder, tmp_path):
    """Returns a function that evaluates models on the splits of these files: the results, and the
    printed text.
    """

    def evaluate(*models, splits=("one",), **options):
        text = io.StringIO()
        data = splits
        if not isinstance(splits, dict):
            data = {name: str(folder / f"{name}.tar") for name in splits}
        out = options.pop("out", tmp_path)
        settings = evaluation.Settings(device="cpu", workers=0, **options)
        console = Console(file=text, width=160)
        results = evaluation.evaluate(models, data, settings, out=out, console=console)
        return results, text.getvalue()

    return evaluate


@pytest.mark.slow
def test_one_model(trained, evaluate, tmp_path):
    results, text = evaluate(
        trained, splits=("one", "two"), templates=["a {} shape"], batch_size=16
    )
    assert json.loads((tmp_path / "evaluation.json").read_text()) == results
    keys = ["checkpoint", "model", "step", "precision", "versions", "splits"]
    assert [*results] == keys
    assert (results["model"], results["step"], results["precision"]) == ("siclip-tiny", 30, "fp32")
    one, two = results["splits"]["one"], results["splits"]["two"]
    keys = ["images", "texts", "image_to_text", "text_to_image", "zero_shot", "left_out"]
    assert [*one] == [*keys, "contact_sheet"]
    figure = one["image_to_text"]["R@5"]
    assert figure["value"] > 2.5 * figure["chance"], "it was trained on these very pictures"
    assert (two["images"], two["texts"]) == (48, 24)
    assert two["zero_shot"]["templates"] == ["a {} shape"]
    for split in (one, two):
        assert min(Image.open(split["contact_sheet"]).size) > 700
    assert "one: 24 samples read, 0 skipped" in text
    for words in ("24 texts", " 4.2%", "siclip-tiny, step 30", "mean per class"):
        assert words in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_several_models_side_by_side(trained, folder, evaluate, tmp_path):
    models = [str(trained), str(folder / "other.pt"), f"open_clip:tiny/{folder / 'tiny.bin'}"]
    results, text = evaluate(*models)
    assert results["checkpoint"] == models[0]
    assert list(results["baselines"]) == models[1:]
    parts = [part["splits"]["one"] for part in (results, *results["baselines"].values())]
    for number, (model, part) in enumerate(zip(models, parts)):
        alone = evaluate(model, out=tmp_path / str(number))[0]["splits"]["one"]
        for key in ("image_to_text", "text_to_image", "zero_shot"):
            assert part[key] == alone[key]
    figures = [part["image_to_text"]["R@5"]["value"] for part in parts]
    assert len({*figures}) > 1
    assert "3 models" in text
    assert all(f"{figure:.1%}" in text for figure in figures)
    assert results["baselines"][models[2]]["step"] is None
    assert len({part["contact_sheet"] for part in parts}) == 3


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_what_gives_no_figures_is_said(trained, evaluate, tmp_path):
    image = tiny.picture((200, 30, 40), "ring")
    labelled = [(f"k{i}", {"png": image, "cls": b"%d" % (i % 3)}) for i in range(4)]
    captioned = [(key, files | {"txt": b"red"}) for key, files in labelled]
    classes = {"b": write(tmp_path / "classes.tar", labelled)}
    last = ("last", {"png": image, "txt": b"blue"})
    numbered = {"a": write(tmp_path / "numbered.tar", [*captioned, last])}
    results, text = evaluate(trained, splits=numbered)
    assert results["splits"]["a"]["image_to_text"]["R@5"]["value"] > 0
    assert results["splits"]["a"]["zero_shot"] is None
    assert "a: no classification: classnames: expected a name for each label of " in text
    assert "got the label 0 and 0 names" in text
    with pytest.raises(ValueError, match="classnames: expected a name for each label"):
        evaluate(trained, splits=classes)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    results, text = evaluate(trained, splits=numbered | classes, classnames=tmp_path / "names.txt")
    assert "a: no classification of images without a label: 1 of 5" in text
    assert "b: no retrieval: no image has a caption" in text
    assert results["splits"]["b"]["contact_sheet"] is None
    one = {"c": write(tmp_path / "one.tar", [("k", {"png": image, "json": b'{"label": "x"}'})])}
    message = "data: expected captions or labels of at least two classes in c, got neither"
    with pytest.raises(ValueError, match=message):
        evaluate(trained, splits=one)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_templates_are_those_of_the_checkpoint(trained, folder, evaluate):
    state = read_checkpoint(trained)
    state["config"]["eval"]["templates"] = ["one {}", "{}"]
    torch.save(state, folder / "phrases.pt")
    results, _ = evaluate(folder / "phrases.pt")
    assert results["splits"]["one"]["zero_shot"]["templates"] == ["one {}", "{}"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_failure_half_way_keeps_the_splits_that_are_done(
    trained, folder, evaluate, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    (tmp_path / "bad.tar").write_bytes(b"no shard" * 1000)
    splits = {
        "one": str(folder / "one.tar"),
        "bad": str(tmp_path / "bad.tar"),
        "never": str(folder / "one.tar"),
    }
    with pytest.raises(RuntimeError, match="bad.tar"):
        evaluate(trained, splits=splits)
    before = (tmp_path / "evaluation.json").read_bytes()
    assert list(json.loads(before)["splits"]) == ["one"]
    for models, problem, message in (
        ((), {}, "model: expected one or several different models, got none"),
        ((trained, trained), {}, "model: expected one or several different models"),
        ((trained,), {"splits": {}}, "data: expected at least one split"),
        # before a model is loaded
        (("gone.pt",), {"splits": {"gone": str(tmp_path / "no-*.tar")}}, "matches none"),
        (("open_clip:tiny/tiny.bin",), {"out": None}, "out: expected a folder for the results"),
        (("gone.pt",), {}, "expected a file of weights, got no such file: gone.pt"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate(*models, **problem)
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_names_of_files():
    assert running.file_name("runs/a: b?c") == "runs_a_ b_c"
    for name in ("第 2 部 (新) 🙂", "e\u0301"):
        assert running.file_name(f"{name}.") == name
    assert running.file_name("..") == "_"


@pytest.mark.slow
def test_a_folder_of_classes_by_the_command(trained, tmp_path):
    for number, name in enumerate(tiny.COLOURS):
        (tmp_path / "classes" / f"c{number}").mkdir(parents=True)
        for shape in tiny.SHAPES:
            file = tmp_path / "classes" / f"c{number}" / f"{shape}.png"
            file.write_bytes(tiny.picture(tiny.COLOURS[name], shape))
    (tmp_path / "names.txt").write_text("\n".join(tiny.COLOURS))
    options = ["--data", tmp_path / "classes", "--classnames", tmp_path / "names.txt"]
    options += ["--templates", "simple", "--out", tmp_path / "out", "--device", "cpu"]
    result = call("evaluate", trained, *options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["splits"]["classes"]
    assert figures["zero_shot"]["classes"] == list(tiny.COLOURS)
    assert figures["zero_shot"]["templates"] == evaluation.phrases("simple")
    assert figures["zero_shot"]["top1"]["value"] > 0.25
    assert (figures["images"], figures["texts"]) == (24, 0)
    assert "image_to_text" not in figures


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_images_that_lie_elsewhere_than_their_json(trained, folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images = []
    annotations = []
    for number, colour in enumerate(tiny.COLOURS):
        name = f"{number}.png"
        (tmp_path / "val2017" / name).write_bytes(tiny.picture(tiny.COLOURS[colour], "circle"))
        images.append({"id": number, "file_name": name})
        annotations.append({"image_id": number, "caption": f"a {colour} circle"})
    captions = tmp_path / "annotations" / "captions_val2017.json"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    command = ("evaluate", trained, "--data", f"coco={captions}", "--workers", 0)
    assert "does not exist; try --images" in one_line(*command)
    line = one_line("evaluate", trained, "--data", folder / "one.tar", "--images", tmp_path)
    assert "data.images: expected a table or a JSON file with it, got" in line
    result = call(*command, "--images", tmp_path / "val2017", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    splits = json.loads((tmp_path / "evaluation.json").read_text())["splits"]
    assert splits["coco"]["images"] == len(tiny.COLOURS)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_splits_of_a_run_are_local_files(trained, folder, tmp_path):
    """They come from the config.yaml in the folder, never from the checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    state = read_checkpoint(trained)
    command = f"pipe:touch {tmp_path / 'canary'}; cat {folder / 'one.tar'}"
    state["config"]["eval"]["splits"] = {"val": command}
    torch.save(state, run / "last.pt")
    assert "data: expected at least one split (--data NAME=DATA), got none" in one_line(
        "evaluate", run / "last.pt"
    )
    text = (trained / "config.yaml").read_text()
    assert "splits: {}" in text

    def configure(split):
        changed = text.replace("splits: {}", f"splits: {{val: {json.dumps(split)}}}")
        (run / "config.yaml").write_text(changed)

    local = str(folder / "one.tar")
    refusal = f"data: expected local files in the eval.splits of {run / 'config.yaml'}, got '"
    for remote in ("pipe:touch canary", "http://127.0.0.1:9/x.tar", [local, "pipe:touch canary"]):
        configure(remote)
        line = one_line("evaluate", run)
        assert refusal in line
        assert line.endswith("; name the data by --data val=DATA")
    configure(local)
    for model in (run, run / "last.pt"):
        result = call("evaluate", model, "--workers", 0, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert list(json.loads((run / "evaluation.json").read_text())["splits"]) == ["val"]
        (run / "evaluation.json").unlink()
    assert not (tmp_path / "canary").exists()
