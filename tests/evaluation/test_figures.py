"""Recall and accuracies against slow, plain counterparts; groups, names of classes, phrases; the
table and the picture.
"""

import io
import json
import math
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from simplclip import data, evaluation
from simplclip.evaluation import index as indexing
from simplclip.evaluation import results as showing
from support.data.pairs import png, write
from support.evaluation import blank, index_of, index_of_features
from support.train import tiny

CPU = torch.device("cpu")


def features(n, m, groups):
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
    y = F.normalize(torch.randn(m, 8, generator=generator), dim=1)
    return x, y, *(torch.randint(0, groups, (size,), generator=generator) for size in (n, m))


def plain_recall(x, y, gx, gy, k):
    hits = 0
    for query, group in zip(x, gx):
        order = sorted(range(len(y)), key=lambda j: -float(query @ y[j]))
        hits += any(gy[j] == group for j in order[:k])
    return hits / len(x)


@pytest.mark.parametrize(("n", "m", "groups"), [(40, 40, 7), (13, 29, 5), (1, 3, 2), (31, 4, 30)])
@pytest.mark.parametrize(
    ("tile_bytes", "columns"), [(1, 1), (500, 3), (500, 16), (2**20, 11), (2**20, 100)]
)
def test_recall_is_the_plain_one_whatever_the_tiles(monkeypatch, n, m, groups, tile_bytes, columns):
    monkeypatch.setattr(indexing, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(indexing, "TILE_COLUMNS", columns)
    x, y, gx, gy = features(n, m, groups)
    for k in (1, 5, 10):
        assert evaluation.recall(x, y, gx, gy)[f"R@{k}"]["value"] == pytest.approx(
            plain_recall(x, y, gx, gy, k)
        )


def test_chance_counts_all_right_answers():
    _, _, gx, gy = features(50, 60, 4)
    gx = torch.cat([gx, torch.tensor([99])])  # a query without a right candidate
    x, y = torch.randn(51, 3), torch.randn(60, 3)
    for k in (1, 5, 10):
        expected = np.mean(
            [1 - math.comb(60 - int((gy == g).sum()), k) / math.comb(60, k) for g in gx]
        )
        assert evaluation.recall(x, y, gx, gy)[f"R@{k}"]["chance"] == pytest.approx(expected)


def test_an_image_without_a_caption_is_a_candidate_and_no_query():
    x = torch.eye(4)
    x[2:] = torch.eye(4)[0]  # as near to the first caption as its own image is
    got = index_of_features(x, torch.eye(4)[:2]).retrieval()
    assert got["image_to_text"]["R@1"] == {"value": 1.0, "chance": 0.5}
    assert got["text_to_image"]["R@5"] == {"value": 1.0, "chance": 1.0}
    assert got["text_to_image"]["R@1"]["chance"] == pytest.approx(0.25)


def test_the_loss_is_that_of_batches_in_a_fixed_order():
    x, y, _, _ = features(10, 10, 10)
    index = index_of_features(x, y)
    scale = torch.tensor(7.0)

    def plain(rows, bias=None):
        logits = scale * x[rows] @ y[rows].T
        signs = 2 * torch.eye(len(rows)) - 1
        both = (F.cross_entropy(part, torch.arange(len(rows))) for part in (logits, logits.T))
        if bias is None:
            return sum(both) / 2
        return -F.logsigmoid(signs * (logits + bias)).sum() / len(rows)

    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for size, parts in ((10, [order]), (4, [order[:4], order[4:8]]), (64, [order])):
        expected = sum(plain(part).item() for part in parts) / len(parts)
        assert index.loss(size, scale) == pytest.approx(expected, rel=1e-5)
    bias = torch.tensor(-2.0)
    assert index.loss(64, scale, bias) == pytest.approx(plain(order, bias).item(), rel=1e-5)
    # no pair has a negative
    together = torch.zeros(10, dtype=torch.int64)
    index = replace(index, groups=together, caption_groups=together)
    assert index.loss(64, scale) == pytest.approx(0, abs=1e-6)
    assert index_of_features(x, y[:0]).loss(64, scale) is None


def test_identical_captions_of_a_group_are_one_and_those_of_an_image_are_not(tmp_path):
    def record(group, *texts):
        return json.dumps({"captions": texts, **({"group": group} if group else {})}).encode()

    records = [record("g", "x", "x", "y"), record("g", "x"), record("h", "x")]
    records += [record(None, "x", "x"), record(None, "x")]
    rows = [(f"k{i}", {"png": png(), "json": content}) for i, content in enumerate(records)]
    index = index_of(data.held_out(write(tmp_path / "s.tar", rows), captions=0))
    assert index.groups.tolist() == [0, 0, 1, 2, 3]
    assert [*zip(index.captions, index.caption_groups.tolist())] == [
        ("x", 0), ("y", 0), ("x", 1), ("x", 2), ("x", 2), ("x", 3)
    ]  # fmt: skip


@pytest.mark.slow
def test_features_do_not_depend_on_batches_and_workers(trained, tmp_path):
    encoder = evaluation.load(trained, device="cpu")
    held = data.held_out(tiny.write_shard(tmp_path / "s.tar"))
    results = []
    for size, workers in ((5, 0), (24, 0), (5, 2)):
        index = evaluation.encode(encoder, held, size, workers=workers)
        results.append((index.image_features, index.text_features))
    torch.testing.assert_close(results[0], results[1])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2]))
    torch.testing.assert_close(results[0][1].norm(dim=1), torch.ones(24))


def encoder_of(model, tokenizer=None):
    return evaluation.Encoder("m", model, blank, tokenizer, CPU, "fp32")


class OneHot(torch.nn.Module):
    """A model whose features of a text are the number that the tokenizer gives it."""

    def encode_text(self, numbers, normalize=True):
        return F.one_hot(numbers, 6).float()


def labelled(tmp_path, labels, names):
    """Returns held-out data with these labels, whose classes have these names."""
    rows = [
        (f"k{i:02}", {"png": png(), "json": json.dumps({"label": label}).encode()})
        for i, label in enumerate(labels)
    ]
    (tmp_path / "names.txt").write_text("\n".join(names))
    return evaluation.named(data.held_out(write(tmp_path / "s.tar", rows)), tmp_path / "names.txt")


def zero_shot(index, names, templates=("{}",)):
    """Returns the figures of a model by which the n-th name has the n-th unit vector."""

    def tokenizer(texts):
        return torch.tensor([names.index(text.removeprefix("a ")) for text in texts])

    return evaluation.zero_shot(encoder_of(OneHot(), tokenizer), index, templates)


@pytest.mark.parametrize("seed", range(3))
def test_zero_shot_counts_and_leaves_out_what_has_no_label(tmp_path, seed):
    names = sorted(tiny.SHAPES)  # of the sixth there is no image
    held_out = labelled(tmp_path, [names[i % 5] for i in range(22)], names)
    features = torch.randn(22, 6, generator=torch.Generator().manual_seed(seed))
    index = index_of(held_out, features)
    index.rows[0] = index.rows[0]._replace(label=None)
    truth = [i % 5 for i in range(22)]
    order = index.image_features.argsort(1, descending=True).tolist()
    right = {k: [truth[i] in order[i][:k] for i in range(1, 22)] for k in (1, 5)}
    per_class = [
        np.mean([hit for hit, number in zip(right[1], truth[1:]) if number == c]) for c in range(5)
    ]
    got = zero_shot(index, names, ["a {}", "{}"])
    about = got["classes"], got["images"], got["templates"]
    assert about == (names, 21, ["a {}", "{}"])
    for name, value, chance in (
        ("top1", np.mean(right[1]), 1 / 6),
        ("top5", np.mean(right[5]), 5 / 6),
        ("mean_per_class", np.mean(per_class), 1 / 6),
    ):
        assert got[name]["value"] == pytest.approx(value)
        assert got[name]["chance"] == chance
    with pytest.raises(ValueError, match="template: expected a phrase with one .* got 'an emoji'"):
        zero_shot(index, names, ["{}", "an emoji"])
    index.rows[:] = [row._replace(label=None) for row in index.rows]
    assert zero_shot(index, names) is None


def test_equal_names_are_one_class_of_labels_that_are_names(tmp_path):
    names = ["crane", "crane", "dog"]
    held_out = labelled(tmp_path, ["crane", "crane", "dog", "dog"], names)
    index = index_of(held_out, F.one_hot(torch.tensor([0, 0, 2, 0]), 6).float())
    got = zero_shot(index, names)
    assert got["classes"] == ["crane", "dog"]
    assert got["top1"] == got["mean_per_class"] == {"value": 0.75, "chance": 0.5}
    assert got["top5"] == {"value": 1.0, "chance": 1.0}
    rows = [row._replace(label=label) for row, label in zip(index.rows, [0, 1, 2, 2])]
    numbered = zero_shot(replace(index, rows=rows), names)
    assert numbered["classes"] == names
    # one of the two images of a crane is wrong
    assert numbered["top1"] == {"value": 0.5, "chance": 1 / 3}


SYNSETS = ("n02123045", "n01440764", "n02099601")  # tabby, tench, golden retriever


def test_names_of_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SYNSETS:
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.JPEG").write_bytes(png(form="JPEG"))
    folder = data.held_out("val")

    def names(classnames):
        return evaluation.named(folder, classnames).classes.names

    assert names(None) == sorted(SYNSETS)
    assert names("imagenet") == ["tench", "Golden Retriever", "tabby cat"]
    shards = data.held_out(write(tmp_path / "s.tar", [("k", {"png": png(), "cls": b"0"})]))
    every = evaluation.named(shards, "imagenet").classes.names
    assert every == list(open_clip.IMAGENET_CLASSNAMES)
    (tmp_path / "three.txt").write_text("\ufeffSchleie\n\nRetriever \nKatze\n")
    assert names("three.txt") == ["Schleie", "Retriever", "Katze"]
    (tmp_path / "two.txt").write_text("a\nb")
    for file, message in (
        ("two.txt", "for each of the 3 folders of .*, got 2"),
        ("gone.txt", "expected imagenet or a file of names, got gone.txt: .*No such file"),
    ):
        with pytest.raises(ValueError, match=f"classnames: .*{message}"):
            names(file)
    (tmp_path / "val" / "n99999999_x").mkdir()
    (tmp_path / "val" / "n99999999_x" / "0.JPEG").write_bytes(png(form="JPEG"))
    folder = data.held_out("val")
    with pytest.raises(ValueError, match="expected a name for each of the 4 folders"):
        names("imagenet")


def test_phrases_around_names(tmp_path):
    for given, templates in (
        (["openai"], open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert evaluation.phrases(given) == [template("{}") for template in templates]
    (tmp_path / "t.txt").write_text("a {c}\nthe {} here\n")
    assert evaluation.phrases(["{}", str(tmp_path / "t.txt")]) == ["{}", "a {}", "the {} here"]
    message = "template: expected a phrase with one {} for the label, openai, simple, or"
    for bad in ("openia", "{} {}", "{x}", "{} }"):
        with pytest.raises(ValueError, match=message):
            evaluation.phrases([bad])
    with pytest.raises(ValueError, match="gone.txt: .*No such file"):
        evaluation.phrases(["gone.txt"])


def split_result(images, texts, **figures):
    return {"images": images, "texts": texts, "zero_shot": None, **figures}


def results_of(splits_of_models):
    about = {"model": "m", "step": 3}
    first, *others = (
        about | {"checkpoint": name, "splits": splits} for name, splits in splits_of_models.items()
    )
    return first | {"baselines": {model["checkpoint"]: model for model in others}}


def test_a_terminal_of_80_columns_is_enough():
    shares = {f"R@{k}": {"value": k / 10, "chance": k / 25010} for k in (1, 5, 10)}
    tops = {"top1": shares["R@10"], "top5": shares["R@5"], "mean_per_class": shares["R@1"]}
    zero_shot = {"classes": [str(number) for number in range(1000)], **tops}
    both = {"image_to_text": shares, "text_to_image": shares}
    result = split_result(5000, 25010, **both) | {"zero_shot": zero_shot}
    names = ["runs/a-run-with-a-long-name/last.pt", "open_clip:ViT-B-32/laion2b_s34b_b79k"]
    splits = {"a name of three words": result}
    for several in (names[:1], names):
        text = io.StringIO()
        results = results_of({name: splits for name in several})
        Console(file=text, width=80).print(showing.table(results))
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) < 20 * len(several)
        for words in ("25010 texts", "5000 images", "1000 classes", "mean per class"):
            assert words in text.getvalue()
        assert "0.004%" in text.getvalue()
        assert "100.0%" in text.getvalue()


def test_the_table_takes_models_that_skipped_other_images():
    """The transform of one of them may refuse an image."""
    recall = {f"R@{k}": {"value": 0.5, "chance": 0.1} for k in evaluation.KS}
    ten, nine = (split_result(n, n, image_to_text=recall, text_to_image=recall) for n in (10, 9))
    table = showing.table(results_of({"a": {"s": ten}, "b": {"s": nine}}))
    assert [*table.columns[2].cells] == ["a", "b", "", "a", "b", ""]


def test_small_shares_keep_a_digit():
    shown = {1.0: "100.0%", 0.1234: "12.3%", 0.001: "0.1%", 0.0: "0.0%"}
    shown |= {0.0004: "0.04%", 1 / 50000: "0.002%"}
    assert {share: showing.percent(share) for share in shown} == shown


def test_data_without_a_usable_sample(tmp_path):
    held_out = data.held_out(write(tmp_path / "b.tar", [("d", {"txt": b"x"})]))
    message = r"data: expected usable samples, got none.*1 missing image"
    with pytest.raises(data.EmptyDataError, match=message):
        evaluation.encode(encoder_of(OneHot()), held_out)
