"""Evaluation of many images and of several models, and results that stay in evaluation.json."""

import io
import json
import unicodedata

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from pairs import call, png, write
from PIL import Image
from rich.console import Console
from trainer_runs import write_models

from simplclip import data, evaluation, retrieval
from simplclip import train as trainer
from simplclip.evaluation import figures
from simplclip.evaluation import run as running

COUNT, CPU = 800, torch.device("cpu")


class Bag(torch.nn.Module):
    """A model of random projections of pixels and of tokens."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = torch.randn(3 * 8 * 8, 32, generator=generator)
        self.text = torch.randn(256, 32, generator=generator)

    def encode_image(self, images, normalize=True):
        return F.normalize(images.flatten(1) @ self.image, dim=1)

    def encode_text(self, tokens, normalize=True):
        return F.normalize((self.text[tokens] * torch.arange(1, 1 + tokens.shape[1])[:, None]).sum(1), dim=1)


def tokenizer(texts):
    return torch.tensor([list(text.encode()[:12].ljust(12)) for text in texts])


def transform(image):
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    samples = []
    for i in range(COUNT):
        record = {"captions": [f"{i}-{j} text" for j in range(1 + i % 3)], "label": f"class {i % 7}"}
        record |= {"group": i // 2} if i % 5 else {}
        samples.append((f"k{i:05d}", {"png": png(i), "json": json.dumps(record).encode()}))
    for shard in range(4):
        write(folder / f"held-{shard}.tar", samples[shard * 200 : (shard + 1) * 200])
    return str(folder / "held-*.tar")


@pytest.mark.slow
def test_streaming_equals_the_figures_in_memory(many, monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval.metrics, "_TILE_BYTES", 2**18)
    monkeypatch.setattr(retrieval.metrics, "_TILE_COLUMNS", 300)
    split = retrieval.Split(data.held_out(many, captions=0), tokenizer, transform)
    model = Bag()
    retrieval.encode(model, split, 64, CPU, "fp32", workers=2, folder=tmp_path)
    assert len(split) == COUNT
    assert [*tmp_path.iterdir()] == []  # the file of features is anonymous
    images = torch.stack([transform(Image.open(io.BytesIO(png(i)))) for i in range(COUNT)])
    x, y = model.encode_image(images), model.encode_text(tokenizer(split.captions))
    torch.testing.assert_close(split.image_features[:], x)
    torch.testing.assert_close(split.text_features[:], y)
    similarities, right = x @ y.T, split.groups[:, None] == split.caption_groups
    figures = retrieval.recall_of(split)
    for direction, s, hit in (("image_to_text", similarities, right), ("text_to_image", similarities.T, right.T)):
        for k in retrieval.KS:
            expected = hit.gather(1, s.topk(k).indices).any(1).double().mean().item()
            assert figures[direction][f"R@{k}"]["value"] == pytest.approx(expected, abs=1e-6)
    found = evaluation.zero_shot(model, split, ["{}"], CPU, "fp32")
    weights = model.encode_text(tokenizer([f"class {i}" for i in range(7)]))
    ranked, truth = (x @ weights.T).topk(5).indices, torch.arange(COUNT) % 7
    assert found["top1"]["value"] == pytest.approx((ranked[:, 0] == truth).double().mean().item(), abs=1e-6)
    assert found["top5"]["value"] == pytest.approx((ranked == truth[:, None]).any(1).double().mean().item(), abs=1e-6)
    recalls = [(ranked[truth == i, 0] == i).double().mean() for i in range(7)]
    assert found["mean_per_class"]["value"] == pytest.approx(torch.stack(recalls).mean().item(), abs=1e-6)
    worst = found["confused"][0]
    pairs = torch.stack([truth, ranked[:, 0]], 1)[ranked[:, 0] != truth]
    assert worst["images"] == pairs.unique(dim=0, return_counts=True)[1].max()
    named = [int(worst[key].removeprefix("class ")) for key in ("class", "taken_for")]
    assert all([truth[row], ranked[row, 0]] == named for row in worst["rows"])


@pytest.mark.slow
def test_features_are_kept_where_one_says(many, tmp_path):
    split, model = retrieval.Split(data.held_out(many), tokenizer, transform), Bag()
    for precision, dtype in (("fp32", np.float32), ("bf16", np.float16)):
        retrieval.encode(model, split, 600, CPU, precision, keep=tmp_path / "held.x")
        for name, features, count in (("image", split.image_features, COUNT), ("text", split.text_features, COUNT)):
            stored = np.load(tmp_path / f"held.x.{name}.npy", mmap_mode="r")
            assert (stored.shape, stored.dtype) == ((count, 32), dtype)
            assert torch.equal(torch.from_numpy(stored.astype(np.float32)), features[:])
            torch.testing.assert_close(features[[5, 2]], features[:][[5, 2]])
    rows = json.loads((tmp_path / "held.x.json").read_text())
    assert rows["keys"] == [f"k{i:05d}" for i in range(COUNT)]
    assert rows["captions"] == split.captions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes two runs, weights of an open_clip model, and a shard."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    for name, seed in (("run", 0), ("other", 1)):
        changes = (f"run.out={folder / name}", f"run.seed={seed}", "run.steps=2")
        trainer.run(tiny.settings(folder, *changes))
    tiny.write_shard(folder / "held.tar")
    return folder


def run(folder, *models, splits=None, out=None, **options):
    text = io.StringIO()
    names = [str(folder / model) if (folder / model).exists() else model for model in models]
    splits = splits or {"held": str(folder / "held.tar")}
    options = {"device": "cpu", "workers": 0, "console": Console(file=text, width=120)} | options
    return evaluation.evaluate(names, splits, out=out, **options), text.getvalue()


@pytest.mark.slow
def test_several_models_side_by_side(folder, tmp_path):
    plain = f"open_clip:tiny/{folder / 'tiny.bin'}"
    got, text = run(folder, "run", "other", plain, out=tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == got
    assert got["checkpoint"] == str(folder / "run")
    assert list(got["baselines"]) == [str(folder / "other"), plain]
    alone = [run(folder, model, out=tmp_path / str(i))[0] for i, model in enumerate(("run", "other", plain))]
    for part, single in zip((got, *got["baselines"].values()), alone):
        for name in ("image_to_text", "text_to_image"):
            assert part["splits"]["held"][name] == single["splits"]["held"][name]
        assert part["splits"]["held"]["zero_shot"]["top1"] == single["splits"]["held"]["zero_shot"]["top1"]
    figures = [part["splits"]["held"]["image_to_text"]["R@5"]["value"] for part in (got, *got["baselines"].values())]
    assert len({*figures}) > 1
    assert "3 models" in text
    for figure in figures:
        assert f"{figure:.1%}" in text
    assert "20.8%" in text
    assert got["baselines"][plain]["step"] is None
    sheets = sorted(path.name for path in tmp_path.glob("evaluation-held*.png"))
    assert len(sheets) == 3
    assert "evaluation-held.png" in sheets
    with pytest.raises(ValueError, match="model: expected one or several different models"):
        run(folder, "run", "run")
    with pytest.raises(ValueError, match="out: expected a folder for the results"):
        run(folder, plain)


@pytest.mark.slow
def test_what_gives_no_figures_is_said(folder, tmp_path):
    image = tiny.picture((200, 30, 40), "ring")
    labelled = [(f"k{i}", {"png": image, "cls": b"%d" % (i % 3)}) for i in range(4)]
    captioned = [(key, files | {"txt": b"red"}) for key, files in labelled]
    classes = write(tmp_path / "classes.tar", labelled)
    numbered = write(tmp_path / "numbered.tar", [*captioned, ("last", {"png": image, "txt": b"blue"})])
    got, text = run(folder, "run", splits={"a": numbered}, out=tmp_path)
    assert got["splits"]["a"]["image_to_text"]["R@5"]["value"] > 0
    assert got["splits"]["a"]["zero_shot"] is None
    told = f"a: no classification: classnames: expected a name for each label of '{numbered}', got the number 0, and no names"
    assert told in text
    with pytest.raises(ValueError, match="classnames: expected a name for each label"):
        run(folder, "run", splits={"b": classes}, out=tmp_path)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    text = run(folder, "run", splits={"a": numbered, "b": classes}, classnames=tmp_path / "names.txt", out=tmp_path)[1]
    assert "a: no classification of images without a label: 1 of 5" in text
    assert "b: no retrieval: no image has a caption" in text
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match="got 2 of 2 classes"):
        run(folder, "run", splits={"a": numbered}, classnames=tmp_path / "names.txt", out=tmp_path)


def test_a_terminal_of_80_columns_is_enough():
    shares = {f"R@{k}": {"value": k / 10, "chance": k / 25010} for k in (1, 5, 10)}
    zero_shot = {"classes": range(1000), "top1": shares["R@10"], "top5": shares["R@5"], "mean_per_class": shares["R@1"]}
    result = {"images": 5000, "texts": 25010, "image_to_text": shares, "text_to_image": shares, "zero_shot": zero_shot}
    names = ["runs/a-run-with-a-long-name/last.pt", "open_clip:ViT-B-32/laion2b_s34b_b79k", "runs/b"]
    models = [{"checkpoint": name, "model": "m", "step": 3, "splits": {"a name of three words": result}} for name in names]
    for several in (models[:1], models):
        text = io.StringIO()
        console = Console(file=text, width=80)
        console.print(figures.table(several[0] | {"baselines": dict(enumerate(several[1:]))}))
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) < 20 * len(several)
        for words in ("25010 texts", "5000 images", "1000 classes", "mean per class", "0.004%", "100.0%"):
            assert words in text.getvalue()


@pytest.mark.slow
def test_what_was_evaluated_stays_by_model_and_split(folder, tmp_path):
    held, two = str(folder / "held.tar"), {"two": str(folder / "held.tar")}
    run(folder, "run", "other", out=tmp_path)
    first = json.loads((tmp_path / "evaluation.json").read_text())
    run(folder, "run", "other", splits=two, out=tmp_path)
    both = json.loads((tmp_path / "evaluation.json").read_text())
    other = str(folder / "other")
    assert both["splits"]["held"] == first["splits"]["held"]
    assert both["baselines"][other]["splits"]["held"] == first["baselines"][other]["splits"]["held"]
    assert list(both["splits"]) == list(both["baselines"][other]["splits"]) == ["held", "two"]
    run(folder, "run", splits={"three": held}, out=tmp_path)
    third = json.loads((tmp_path / "evaluation.json").read_text())
    assert third["baselines"] == both["baselines"]
    assert list(third["splits"]) == ["held", "two", "three"]
    gone = {"gone": str(tmp_path / "no-*.tar")}
    assert run(folder, "run", "other", splits=gone, skip_missing=True, out=tmp_path)[0]["splits"] == {}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == third
    for other in ("[1, 2", "[]", '{"splits": 3}'):
        (tmp_path / "evaluation.json").write_text(other)
        with pytest.raises(
            ValueError, match="out: expected no evaluation.json, or one to add splits to, got .*evaluation.json"
        ):
            run(folder, "run", splits=two, out=tmp_path)
        assert (tmp_path / "evaluation.json").read_text() == other


@pytest.mark.slow
def test_a_run_that_fails_half_way_keeps_the_splits_that_are_done(folder, tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no shard" * 1000)
    splits = {"held": str(folder / "held.tar"), "bad": str(tmp_path / "bad.tar"), "never": str(folder / "held.tar")}
    with pytest.raises(RuntimeError, match="bad.tar"):
        run(folder, "run", splits=splits, out=tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found["splits"]) == ["held"]
    assert found["splits"]["held"]["image_to_text"]["R@1"]["value"] >= 0
    with pytest.raises(RuntimeError, match="bad.tar"):
        run(folder, "run", splits={"held": splits["bad"]}, out=tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        run(folder, "run", "gone.pt", splits={"new": splits["held"]}, out=tmp_path)
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["splits"]) == ["held", "new"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["部 2 (新) 🙂", unicodedata.normalize("NFD", "é")])
def test_names_of_splits_are_any_words(folder, tmp_path, name):
    result = call("evaluate", folder / "run", "--data", f"{name}={folder / 'held.tar'}", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert list(found["splits"]) == [name]
    assert name in result.output
    assert name in (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    assert (tmp_path / f"evaluation-{name}.png").exists()
    assert found["splits"][name]["contact_sheet"] == str(tmp_path / f"evaluation-{name}.png")


def test_small_shares_keep_a_digit():
    shown = {1.0: "100.0%", 0.1234: "12.3%", 0.001: "0.1%", 0.0004: "0.04%", 1 / 50000: "0.002%", 0.0: "0.0%"}
    assert {share: figures.percent(share) for share in shown} == shown


def test_names_of_files():
    assert running.file_name("runs/a: b?c") == "runs_a_ b_c"
    assert running.file_name("第 2 部 🙂.") == "第 2 部 🙂"
    assert running.file_name("..") == "_"


@pytest.mark.slow
def test_the_confusion_sheet_shows_the_pairs(folder, tmp_path):
    got, text = run(folder, "run", out=tmp_path)
    confused = got["splits"]["held"]["zero_shot"]["confused"]
    assert confused
    assert confused[0]["images"] >= len(confused[0]["examples"]) > 0
    assert all(key.startswith(f"0-{pair['class']}-") for pair in confused for key in pair["examples"])
    image = np.asarray(Image.open(got["splits"]["held"]["confusion_sheet"]).convert("RGB"))
    assert (image == tiny.COLOURS[confused[0]["class"]]).all(-1).any()
    assert "confusion-held.png" in text


@pytest.mark.slow
def test_classes_of_a_folder_by_the_command(folder, tmp_path):
    for number, name in enumerate(tiny.COLOURS):
        (tmp_path / "classes" / f"c{number}").mkdir(parents=True)
        for shape in tiny.SHAPES:
            (tmp_path / "classes" / f"c{number}" / f"{shape}.png").write_bytes(tiny.picture(tiny.COLOURS[name], shape))
    (tmp_path / "names.txt").write_text("\n".join(tiny.COLOURS))
    options = ("--classnames", tmp_path / "names.txt", "--templates", "simple", "--out", tmp_path / "out", "--device", "cpu")
    result = call("evaluate", folder / "run", "--data", tmp_path / "classes", "--features", tmp_path / "features", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["splits"]["classes"]
    assert found["zero_shot"]["classes"] == list(tiny.COLOURS)
    assert found["zero_shot"]["templates"] == evaluation.phrases("simple")
    assert (found["texts"], found["contact_sheet"]) == (0, None)
    assert "image_to_text" not in found
    assert "mean per class" in result.output
    assert np.load(tmp_path / "features" / "classes.image.npy").shape == (24, 256)
