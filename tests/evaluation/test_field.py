"""Figures equal those of clip-benchmark and open_clip on the same files, with the built-in teacher."""

import functools
import json

import open_clip
import open_clip_train.zero_shot
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from pairs import write

import simplclip
from simplclip import evaluation
from simplclip.data.broken import Skipped
from simplclip.data.shards import contents, read_shard
from simplclip.demo import builtin, emoji
from simplclip.demo import teacher as networks

KS = (1, 5, 10)
TEMPLATES = ["a drawing of {c}", "{c}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes heads of the built-in teacher, and the built-in data in clip-benchmark's layouts for retrieval and classes."""
    folder, patch = tmp_path_factory.mktemp("field"), pytest.MonkeyPatch()
    every = emoji.concepts()
    patch.setattr(emoji, "concepts", lambda: every[::14])
    patch.setattr(emoji, "HELD_OUT", 40)
    patch.setattr(builtin, "STEPS", 30)
    patch.setattr(builtin, "BATCH", 64)
    emoji.build(folder / "emoji", progress=False)
    heads, _ = builtin.train([str(path) for path in sorted((folder / "emoji").glob("train-*.tar"))], **TRAIN)
    networks.save_heads(heads, folder / "heads.safetensors")
    shards = sorted((folder / "emoji").glob("*.tar"))
    samples = [contents(sample) for shard in shards for sample in read_shard(str(shard), Skipped())]
    samples = [sample for sample in samples if sample["__key__"].startswith("twemoji/")]  # each caption once
    records = [json.loads(sample["json"]) for sample in samples]
    labels = sorted({record["label"] for record in records if "label" in record})
    several, classed = [], []
    for number, (sample, record) in enumerate(zip(samples, records)):
        several.append((f"s{number:07d}", {"png": sample["png"], "txt": "\n".join(record["captions"]).encode()}))
        if "label" in record:
            classed.append((f"s{number:07d}", {"png": sample["png"], "cls": str(labels.index(record["label"])).encode()}))
    for name, kind, rows in (("retrieval", "retrieval", several), ("classes", "classification", classed)):
        (folder / name / "test").mkdir(parents=True)
        (folder / name / "dataset_type.txt").write_text(f"{kind}\n")
        (folder / name / "test" / "nshards.txt").write_text("2\n")
        for shard, part in enumerate((rows[:50], rows[50:])):
            write(folder / name / "test" / f"{shard}.tar", part)
    (folder / "classes" / "classnames.txt").write_text("\n".join(labels) + "\n")
    (folder / "classes" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    assert max(len(record["captions"]) for record in records) > 2
    patch.undo()
    return folder


TRAIN = {"device": torch.device("cpu"), "precision": "fp32", "progress": False}


@pytest.fixture(autouse=True)
def float_of_one_element(monkeypatch):
    """Makes float() take arrays [1], as both packages need and numpy 2.4 refuses."""
    for module in (zeroshot_classification, open_clip_train.zero_shot):
        monkeypatch.setattr(module, "float", lambda x: x.item() if hasattr(x, "item") else float(x), raising=False)


@pytest.fixture(scope="module")
def ours(folder):
    """Returns the figures of evaluate."""
    splits = {name: str(folder / name) for name in ("retrieval", "classes")}
    options = {"out": folder / "out", "device": "cpu", "batch_size": 16}
    return evaluation.evaluate(f"builtin/{folder / 'heads.safetensors'}", splits, **options)["splits"]


@pytest.fixture(scope="module")
def teacher(folder):
    return simplclip.load("builtin", folder / "heads.safetensors", device="cpu")


def theirs(folder, teacher, collate=None):
    found = build_wds_dataset("x", teacher.preprocess, data_dir=str(folder))
    loader = torch.utils.data.DataLoader(found, 16, collate_fn=collate)
    loader.dataset.classes = found.classes
    return loader, found


@pytest.mark.slow
def test_retrieval_with_several_captions_is_that_of_clip_benchmark(folder, teacher, ours):
    loader, _ = theirs(folder / "retrieval", teacher, image_captions_collate_fn)
    evaluated = zeroshot_retrieval.evaluate(teacher.model, loader, teacher.tokenizer, "cpu", amp=False, recall_k_list=KS)
    for k in KS:
        found = ours["retrieval"]["image_to_text"][f"R@{k}"], ours["retrieval"]["text_to_image"][f"R@{k}"]
        assert found[0]["value"] == pytest.approx(evaluated[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert found[1]["value"] == pytest.approx(evaluated[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert all(figure["value"] > 2 * figure["chance"] for figure in found)
    assert ours["retrieval"]["texts"] > 2 * ours["retrieval"]["images"]
    assert ours["retrieval"]["zero_shot"] is None


@pytest.mark.slow
def test_classification_is_that_of_clip_benchmark_and_of_open_clip(folder, teacher, ours):
    loader, found = theirs(folder / "classes", teacher)
    mine, tokenizer = ours["classes"]["zero_shot"], teacher.tokenizer
    evaluated = zeroshot_classification.evaluate(
        teacher.model, loader, tokenizer, found.classes, found.templates, "cpu", amp=False
    )
    assert mine["classes"] == found.classes
    assert mine["templates"] == [template.replace("{c}", "{}") for template in TEMPLATES]
    assert mine["top1"]["value"] == pytest.approx(evaluated["acc1"], abs=1e-6)
    assert mine["top5"]["value"] == pytest.approx(evaluated["acc5"], abs=1e-6)
    assert mine["mean_per_class"]["value"] == pytest.approx(evaluated["mean_per_class_recall"], abs=1e-6)
    assert mine["top1"]["chance"] < mine["top1"]["value"] < 1
    phrases = [functools.partial(template.replace("{c}", "{}").format) for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(teacher.model, tokenizer, found.classes, phrases)
    hits, count = torch.zeros(2), 0
    with torch.no_grad():
        for images, target in loader:
            logits = 100.0 * teacher.model.encode_image(images, normalize=True) @ weights
            hits += torch.tensor(open_clip_train.zero_shot.accuracy(logits, target, topk=(1, 5)))
            count += len(target)
    assert count == mine["images"]
    assert [mine["top1"]["value"], mine["top5"]["value"]] == pytest.approx((hits / count).tolist(), abs=1e-6)
    assert ours["classes"]["contact_sheet"] is None
