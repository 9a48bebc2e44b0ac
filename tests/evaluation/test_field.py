"""Figures equal those of clip-benchmark and open_clip on the same files."""

import functools
from unittest import mock

import open_clip
import pytest
import torch

import simplclip
from simplclip import evaluation
from simplclip.evaluation import run as running
from support.data.pairs import write
from support.train import tiny

pytestmark = pytest.mark.slow


KS = (1, 5, 10)
TEMPLATES = ["a {c}", "{c}"]
CONCEPTS = [(colour, shape) for colour in tiny.COLOURS for shape in tiny.SHAPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes pictures with captions and with classes in clip-benchmark's layouts."""
    folder = tmp_path_factory.mktemp("field")
    retrieval, classes = [], []
    for number, (colour, shape) in enumerate(CONCEPTS):
        image, key = tiny.picture(tiny.COLOURS[colour], shape), f"s{number:07d}"
        captions = [f"{colour} {shape}", f"a {colour} {shape}", f"{shape} in {colour}"]
        text = "\n".join(captions[: 1 + number % 3])
        retrieval.append((key, {"png": image, "txt": text.encode()}))
        classes.append((key, {"png": image, "cls": str(number).encode()}))
    for name, kind, rows in (
        ("retrieval", "retrieval", retrieval),
        ("classes", "classification", classes),
    ):
        (folder / name / "test").mkdir(parents=True)
        (folder / name / "dataset_type.txt").write_text(f"{kind}\n")
        (folder / name / "test" / "nshards.txt").write_text("2\n")
        for shard, part in enumerate((rows[:10], rows[10:])):
            write(folder / name / "test" / f"{shard}.tar", part)
    (folder / "classes" / "classnames.txt").write_text("\n".join(map(" ".join, CONCEPTS)) + "\n")
    (folder / "classes" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder


@pytest.fixture(autouse=True)
def float_of_one_element(monkeypatch):
    """Makes float() take arrays [1], as both packages need and numpy 2.4 refuses."""
    # these packages are imported here, since they take two seconds
    import open_clip_train.zero_shot
    from clip_benchmark.metrics import zeroshot_classification

    def to_float(x):
        return x.item() if hasattr(x, "item") else float(x)

    for module in (zeroshot_classification, open_clip_train.zero_shot):
        monkeypatch.setattr(module, "float", to_float, raising=False)


@pytest.fixture(scope="module")
def ours(trained, folder):
    """Returns the figures of evaluate, which draws no pictures here."""
    splits = {name: str(folder / name) for name in ("retrieval", "classes")}
    settings = evaluation.Settings(device="cpu", batch_size=16)
    with mock.patch.object(running, "write_sheet"):
        return evaluation.evaluate(trained, splits, settings, out=folder / "out")["splits"]


@pytest.fixture(scope="module")
def encoder(trained):
    return simplclip.load(trained, device="cpu")


def of_clip_benchmark(folder, encoder, collate=None):
    from clip_benchmark.datasets.builder import build_wds_dataset

    data = build_wds_dataset("x", encoder.preprocess, data_dir=str(folder))
    loader = torch.utils.data.DataLoader(data, 16, collate_fn=collate)
    loader.dataset.classes = data.classes
    return loader, data


def test_retrieval_with_several_captions_is_that_of_clip_benchmark(folder, encoder, ours):
    from clip_benchmark.datasets.builder import image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_retrieval

    loader, _ = of_clip_benchmark(folder / "retrieval", encoder, image_captions_collate_fn)
    expected = zeroshot_retrieval.evaluate(
        encoder.model, loader, encoder.tokenizer, "cpu", amp=False, recall_k_list=KS
    )
    for k in KS:
        for direction, name in (("image_to_text", "text"), ("text_to_image", "image")):
            figure = ours["retrieval"][direction][f"R@{k}"]
            theirs = expected[f"{name}_retrieval_recall@{k}"]
            assert figure["value"] == pytest.approx(theirs, abs=1e-6)
            assert figure["value"] > 1.5 * figure["chance"]
    assert ours["retrieval"]["texts"] == 2 * ours["retrieval"]["images"]
    assert ours["retrieval"]["zero_shot"] is None


def test_classification_is_that_of_clip_benchmark_and_of_open_clip(folder, encoder, ours):
    from clip_benchmark.metrics import zeroshot_classification
    from open_clip_train.zero_shot import accuracy

    loader, data = of_clip_benchmark(folder / "classes", encoder)
    figures, tokenizer = ours["classes"]["zero_shot"], encoder.tokenizer
    names = encoder.model, loader, tokenizer, data.classes, data.templates
    expected = zeroshot_classification.evaluate(*names, "cpu", amp=False)
    assert figures["classes"] == data.classes
    assert figures["templates"] == [template.replace("{c}", "{}") for template in TEMPLATES]
    assert figures["top1"]["value"] == pytest.approx(expected["acc1"], abs=1e-6)
    assert figures["top5"]["value"] == pytest.approx(expected["acc5"], abs=1e-6)
    mean = expected["mean_per_class_recall"]
    assert figures["mean_per_class"]["value"] == pytest.approx(mean, abs=1e-6)
    assert figures["top1"]["chance"] < figures["top1"]["value"] < 1
    phrases = [functools.partial(template.replace("{c}", "{}").format) for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(encoder.model, tokenizer, data.classes, phrases)
    hits, count = torch.zeros(2), 0
    with torch.no_grad():
        for images, target in loader:
            logits = 100.0 * encoder.model.encode_image(images, normalize=True) @ weights
            hits += torch.tensor(accuracy(logits, target, topk=(1, 5)))
            count += len(target)
    assert count == figures["images"]
    tops = [figures["top1"]["value"], figures["top5"]["value"]]
    assert tops == pytest.approx((hits / count).tolist(), abs=1e-6)
    assert "image_to_text" not in ours["classes"]
