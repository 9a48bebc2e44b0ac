"""Retrieval and classification against slow, plain counterparts; checkpoints that do not fit; written files."""

import io
import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from runs import go

from simplclip import evaluation, models, retrieval
from simplclip.models.trained import load_model
from simplclip.train import checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    go(tiny.settings(folder, "run.steps=30", "optim.lr=2e-3", "data.augment=none"))
    return folder / "run"


def split_of(shard):
    transform = models.transforms("siclip-tiny", train=False)
    (split,) = retrieval.load_splits({"s": shard}, models.tokenizer("siclip-tiny"), transform).values()
    for _ in split.read(10):
        pass
    return split


@pytest.fixture
def shards(tmp_path):
    """Writes two splits: the first has each concept once, the second twice."""
    return {"one": tiny.write_shard(tmp_path / "one.tar"), "two": tiny.write_shard(tmp_path / "two.tar", copies=2)}


@pytest.fixture
def split(tmp_path):
    return split_of(tiny.write_shard(tmp_path / "s.tar"))


def features(n, m, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
    y = F.normalize(torch.randn(m, 8, generator=generator), dim=1)
    return x, y, *(torch.randint(0, groups, (size,), generator=generator) for size in (n, m))


def plain_recall(x, y, gx, gy, k):
    hits = 0
    for q, g in zip(x, gx):
        order = sorted(range(len(y)), key=lambda j: -float(q @ y[j]))
        hits += any(gy[j] == g for j in order[:k])
    return hits / len(x)


@pytest.mark.parametrize(("n", "m", "groups"), [(40, 40, 7), (13, 29, 5), (1, 3, 2), (31, 4, 30)])
@pytest.mark.parametrize(("tile_bytes", "columns"), [(1, 1), (500, 3), (500, 16), (2**20, 11), (2**20, 100)])
def test_recall_is_the_plain_one_whatever_the_tiles(monkeypatch, n, m, groups, tile_bytes, columns):
    monkeypatch.setattr(retrieval.metrics, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(retrieval.metrics, "_TILE_COLUMNS", columns)
    x, y, gx, gy = features(n, m, groups)
    for k in (1, 5, 10):
        assert retrieval.recall(x, y, gx, gy)[f"R@{k}"]["value"] == pytest.approx(plain_recall(x, y, gx, gy, k))


def test_chance_counts_all_right_answers():
    _, _, gx, gy = features(50, 60, 4)
    gx = torch.cat([gx, torch.tensor([99])])  # a query without a right candidate
    x, y = torch.randn(51, 3), torch.randn(60, 3)
    for k in (1, 5, 10):
        expected = np.mean([1 - math.comb(60 - int((gy == g).sum()), k) / math.comb(60, k) for g in gx])
        assert retrieval.recall(x, y, gx, gy)[f"R@{k}"]["chance"] == pytest.approx(expected)


class ColourModel(torch.nn.Module):
    """A model whose features tell the colour of an image, and the colour that a text names."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def encode_text(self, texts, normalize=True):
        return torch.stack([F.one_hot(t, len(self.names)).float() for t in texts])


def test_zero_shot_counts_and_leaves_out_what_has_no_label(split):
    names = sorted(tiny.COLOURS)
    split.labels[0] = None
    truth = torch.tensor([names.index(label or "red") for label in split.labels])
    split.image_features = F.one_hot(truth, 4).float()
    wrong = [i for i, label in enumerate(split.labels) if label == "blue"][:2]
    split.image_features[wrong] = F.one_hot(torch.tensor(names.index("red")), 4).float()
    split.tokenizer = lambda texts: torch.tensor([names.index(t.removeprefix("a ")) for t in texts])

    def zero_shot(templates):
        return evaluation.zero_shot(ColourModel(names), split, templates, torch.device("cpu"), "fp32")

    got = zero_shot(["a {}", "{}"])
    assert got["classes"] == names
    assert got["images"] == 23
    assert got["top1"] == {"value": pytest.approx(21 / 23), "chance": 0.25}
    assert got["top5"] == {"value": 1.0, "chance": 1.0}
    assert got["mean_per_class"] == {"value": pytest.approx((1 + 4 / 6 + 1 + 1) / 4), "chance": 0.25}
    assert got["confused"] == [{"class": "blue", "taken_for": "red", "images": 2, "of": 6, "rows": wrong}]
    with pytest.raises(ValueError, match="template: expected a phrase with one {} for the label, .* got 'an emoji'"):
        zero_shot(["{}", "an emoji"])
    split.labels = ["red"] * 24
    assert zero_shot(["{}"]) is None


@pytest.mark.slow
def test_run_writes_table_json_and_pictures(trained, shards, tmp_path):
    text, gone = io.StringIO(), {"gone": str(tmp_path / "no-*.tar")}
    options = {"device": "cpu", "skip_missing": True, "console": Console(file=text, width=160)}
    got = evaluation.evaluate(trained, shards | gone, out=tmp_path / "out", templates=["a {} shape"], **options)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == got
    assert list(got["splits"]) == ["one", "two"]
    assert got["step"] == 30
    found = got["splits"]["one"]["image_to_text"]["R@5"]
    assert found["value"] > 2.5 * found["chance"], "it was trained on these very pictures"
    assert got["splits"]["two"]["texts"] == 24
    assert got["splits"]["two"]["zero_shot"]["templates"] == ["a {} shape"]
    for name in ("one", "two"):
        assert min(Image.open(tmp_path / "out" / f"evaluation-{name}.png").size) > 800
    for words in ("skipped gone: ", "24 texts", " 4.2%"):
        assert words in text.getvalue()
    with pytest.raises(ValueError, match="matches none"):
        evaluation.evaluate(trained, gone, device="cpu", out=tmp_path)
    with pytest.raises(ValueError, match="expected at least one split"):
        evaluation.evaluate(trained, device="cpu")


def test_features_do_not_depend_on_the_batch_size(trained, split):
    model, config, _ = load_model(trained / "last.pt")
    assert not model.training
    assert config.model.name == "siclip-tiny"
    found = []
    for size, workers in ((5, 0), (24, 0), (5, 2)):
        retrieval.encode(model, split, size, torch.device("cpu"), "fp32", workers=workers)
        found.append((split.image_features[:], split.text_features[:]))
    torch.testing.assert_close(found[0], found[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))
    torch.testing.assert_close(found[0][1].norm(dim=1), torch.ones(24))


def test_contact_sheet_frames_what_is_right(tmp_path, split):
    def green_of(text_features):
        split.image_features, split.text_features = torch.eye(24), text_features
        pixels = np.asarray(Image.open(evaluation.contact_sheet(tmp_path / "s.png", split, "t")).convert("RGB"))
        return (pixels == (0x1A, 0x98, 0x50)).all(-1).sum()

    right, wrong = green_of(torch.eye(24)), green_of(-torch.eye(24))
    assert right > 10 * wrong > 0  # the legend has a green frame even if all answers are wrong


def test_a_model_that_is_not_finite_is_an_error(trained, shards, tmp_path):
    state = checkpoint.load(trained)
    for value in state["model"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan.pt: expected finite features, got text features that are not finite"):
        evaluation.evaluate(tmp_path / "nan.pt", shards, device="cpu")
