"""examples/emoji: the pairs that build.py writes, the held-out part, and the teacher that teach.py
makes of them.
"""

import collections
import io
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image

from support.data.pairs import digests, meta
from support.programs import EXAMPLES, call, load_example

build = load_example("emoji/build")
domains = load_example("emoji/domains")
sources = load_example("emoji/sources")

KEPT = 36  # concepts in the small builds
HELD_OUT = 6
TRAIN = 2 * (KEPT - HELD_OUT)  # pairs, of two vendors


@pytest.fixture(scope="module")
def few():
    """Takes a cross-section of the concepts, so that a build takes a fraction of a second."""
    every = build.concepts()
    return every[:: len(every) // KEPT][:KEPT]


@pytest.fixture(scope="module")
def teach():
    return load_example("emoji/teach")  # imports transformers


@pytest.fixture
def small(few, monkeypatch):
    monkeypatch.setattr(build, "concepts", lambda: few)
    monkeypatch.setattr(build, "HELD_OUT", HELD_OUT)
    monkeypatch.setattr(build, "find_font", lambda: None)


@pytest.fixture
def font(small, monkeypatch):
    monkeypatch.setattr(build, "find_font", sources.find_font)
    if sources.find_font() is None:
        pytest.skip("the Noto font is not installed: apt-get install -y fonts-noto-color-emoji")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def samples(folder, split):
    shards = sorted(map(str, folder.glob(f"{split}-*.tar")))
    return [*wds.WebDataset(shards, shardshuffle=False)]


def records(folder, split):
    return [json.loads(sample["json"]) for sample in samples(folder, split)]


def test_concepts():
    every = {concept.key: concept for concept in build.concepts()}
    assert len(every) > 1800
    assert list(every) == sorted(every)
    assert not any(tone in key.split("-") for key in every for tone in ("fe0f", "1f3fb", "1f3ff"))
    heart, sweden = every["2764"], every["1f1f8-1f1ea"]
    assert (heart.captions[0], heart.group) == ("red heart", "Smileys & Emotion")
    assert {"heart", "an emoji of red heart"} <= set(heart.captions)
    assert (sweden.captions[:2], sweden.group) == (["flag of Sweden", "Sweden"], "Flags")
    assert every["1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"].captions[0] == "flag of Wales"
    assert sum(concept.group is None for concept in every.values()) < 30
    assert all(len(concept.captions) >= 3 and all(concept.captions) for concept in every.values())
    captions = [caption.lower() for concept in every.values() for caption in concept.captions]
    assert len(set(captions)) == len(captions)  # none is a caption of two concepts


def test_a_build_holds_what_its_summary_says(small, out, few):
    summary = build.build(out)
    assert summary == meta(out)
    shards = [*(f"train-{i:06d}.tar" for i in range(4)), "concepts-000000.tar"]
    assert {path.name for path in out.iterdir()} == {*shards, "LICENSES.md", "meta.json"}
    for split, number in (("train", KEPT - HELD_OUT), ("concepts", HELD_OUT)):
        entry = summary["splits"][split]
        assert entry["samples"] == len(records(out, split)) == 2 * number
        assert all(
            (out / name).stat().st_size == shard["bytes"] for name, shard in entry["shards"].items()
        )
        assert sum(shard["samples"] for shard in entry["shards"].values()) == entry["samples"]
    held_out, train = (
        {record["group"] for record in records(out, split)} for split in ("concepts", "train")
    )
    assert held_out == set(summary["held_out_concepts"])
    assert not held_out & train
    concepts, drawings = {concept.key: concept for concept in few}, collections.defaultdict(set)
    for sample in (*samples(out, "train"), *samples(out, "concepts")):
        record = json.loads(sample["json"])
        concept = concepts[record["group"]]
        assert sample["__key__"] == f"{record['vendor']}/{concept.key}"
        assert record["captions"] == concept.captions
        assert sample["txt"].decode() == concept.captions[0]
        assert record.get("label") == concept.group
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.size, image.mode) == ((72, 72), "RGB")
        if concept.group != "Flags" and "black" not in str(concept.captions):
            assert image.getpixel((0, 0)) == (255, 255, 255)
        drawings[concept.key].add(sample["png"])
    assert {len(pair) for pair in drawings.values()} == {2}  # each vendor draws differently
    licences = (out / "LICENSES.md").read_text()
    assert all(licence in licences for licence in ("CC-BY-4.0", "CC-BY-SA-4.0"))
    assert "OFL" not in licences  # Noto's, which is not in this build


def test_a_third_vendor_is_held_out(font, out):
    build.build(out)
    train, vendor = (
        {record["group"] for record in records(out, split)} for split in ("train", "vendor")
    )
    assert vendor <= train
    assert {record["vendor"] for record in records(out, "vendor")} == {"noto"}
    assert len(vendor) > 0.9 * (KEPT - HELD_OUT)
    assert any("-" in key for key in vendor)  # some emoji are ligatures
    assert "SIL Open Font License" in (out / "LICENSES.md").read_text()
    noto = sources.noto(sources.find_font())
    # the red, green and blue heart, by the font's tables
    for key, channel in (("2764", 0), ("1f49a", 1), ("1f499", 2)):
        pixel = sources.square(noto.draw(sources.Concept(key, [], None, None))).getpixel((36, 36))
        assert pixel.index(max(pixel)) == channel
    assert not noto.has(sources.Concept("1f600-1f600", [], None, None))


def test_no_font_for_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(sources, "FONT_FOLDERS", ("~no-such-user/.fonts",))
    assert sources.find_font() is None


@pytest.mark.slow
def test_swapped_captions(small, tmp_path):
    """A share of the training pairs exchange captions, and nothing else differs."""
    build.build(tmp_path / "clean")
    build.build(tmp_path / "noisy", swap=0.3)
    clean, noisy = (records(tmp_path / name, "train") for name in ("clean", "noisy"))
    pairs = list(zip(clean, noisy, strict=True))
    swapped = [(before, after) for before, after in pairs if after.get("swapped")]
    assert len(swapped) == round(0.3 * len(pairs))
    assert all(before == after for before, after in pairs if not after.get("swapped"))
    captions = {before["group"]: before["captions"] for before, _ in pairs}
    for before, after in swapped:
        assert after["group"] != before["group"]
        assert after["captions"] == captions[after["group"]]
        assert (after["vendor"], after.get("label")) == (before["vendor"], before.get("label"))
    befores, afters = zip(*swapped)
    assert sorted(row["group"] for row in befores) == sorted(row["group"] for row in afters)
    message = f"expected 0, or a share that swaps at least a few of {TRAIN} pairs, got 0.01"
    with pytest.raises(SystemExit, match=f"--swap: {message}"):
        build.build(tmp_path / "none", swap=0.01)


def test_builds_repeat_are_kept_and_touch_no_other_files(small, out, tmp_path, monkeypatch):
    (out.with_name("out.unfinished")).mkdir()  # of a process that was killed
    (out.with_name("out.unfinished") / "train-000000.tar").write_text("half")
    build.build(out)
    born = (out / "meta.json").stat().st_ino
    assert build.build(out) == meta(out)
    assert (out / "meta.json").stat().st_ino == born
    monkeypatch.setattr("time.time", lambda: 4e9)
    build.build(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("not a build")
    for folder in (out, tmp_path / "thesis"):
        message = f"{folder.name}: expected a new folder, or a build of the same settings"
        with pytest.raises(SystemExit, match=message):
            build.build(folder, swap=0.3)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again", "thesis"}


def separable(teach, number=64):
    """Returns features that tell pairs apart: two captions each, two pairs of each group."""
    networks, generator = load_example("emoji/teacher"), torch.Generator().manual_seed(0)
    groups = torch.arange(number) // 2
    codes = torch.randn(number // 2, 24, generator=generator)
    images = codes[groups] @ torch.randn(24, networks.IMAGE_FEATURES, generator=generator)
    texts = codes @ torch.randn(24, networks.TEXT_FEATURES, generator=generator)
    texts = torch.cat([texts, texts + 0.1 * torch.randn(texts.shape, generator=generator)])
    return teach.Features(
        images[None], texts, [[g, g + number // 2] for g in groups.tolist()], groups
    )


@pytest.mark.slow
def test_heads_learn_align_and_repeat_and_pairs_of_a_group_are_no_negatives(teach, monkeypatch):
    ids, forward = [], teach.ClipPMLoss.forward
    monkeypatch.setattr(
        teach.ClipPMLoss, "forward", lambda s, *a, **k: ids.append(k["ids"]) or forward(s, *a, **k)
    )
    monkeypatch.setattr(teach, "STEPS", 25)
    monkeypatch.setattr(teach, "BATCH", 48)
    pairs, made = separable(teach), []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(teach.Heads())
        teach.fit(made[-1], pairs, random.Random(0), torch.device("cpu"))
    first, again = made
    x = F.normalize(first.image(pairs.images[0]), dim=-1)
    y = F.normalize(first.text(pairs.texts[:32]), dim=-1)
    assert ((x @ y.T).argmax(1) == pairs.groups).float().mean() > 0.95
    assert first.logit_scale.exp() <= teach.MAX_SCALE + 1e-3
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert any(len(set(batch.tolist())) < len(batch) for batch in ids)


def features(folder):
    """Returns the teacher's features in the sidecars of train: key -> float32 [1 + C, WIDTH]."""
    taught = {sample["__key__"]: sample["teacher.npy"] for sample in samples(folder, "train")}
    arrays = {key: np.load(io.BytesIO(content)) for key, content in taught.items()}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    return {key: array.astype(np.float32) for key, array in arrays.items()}


@pytest.mark.slow
def test_a_teacher_of_a_build_and_the_same_heads_for_another(
    teach, small, out, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(teach, "STEPS", 20)
    monkeypatch.setattr(teach, "BATCH", 32)
    build.build(out)
    encoded, encode = [], teach.Networks.image_features
    monkeypatch.setattr(
        teach.Networks, "image_features", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    arguments = [str(out / "train-*.tar"), "--out", str(tmp_path / "taught")]
    teach.main(arguments)
    assert sum(encoded) == (1 + teach.VIEWS) * TRAIN  # each image and each view once
    about, taught = meta(tmp_path / "taught"), features(tmp_path / "taught")
    assert (about["teacher"]["width"], about["splits"]["train"]["samples"]) == (teach.WIDTH, TRAIN)
    assert list(taught) == [sample["__key__"] for sample in samples(out, "train")]
    assert [len(rows) - 1 for rows in taught.values()] == [
        len(record["captions"]) for record in records(out, "train")
    ]
    norms = np.linalg.norm(np.concatenate(list(taught.values())), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-2)
    # images and their captions
    assert np.mean([(rows[1:] @ rows[0]).mean() for rows in taught.values()]) > 0.2
    teach.main(arguments)
    assert "is complete and is kept" in capsys.readouterr().out
    encoded.clear()
    heads = ["--heads", str(tmp_path / "taught" / "heads.safetensors")]
    teach.main([arguments[0], "--out", str(tmp_path / "again"), *heads])
    assert sum(encoded) == TRAIN
    for key, rows in features(tmp_path / "again").items():
        np.testing.assert_allclose(rows, taught[key], atol=2e-3)


def test_padding_and_company_do_not_change_features(teach):
    model = teach.Networks()
    with torch.no_grad():
        both = model.text_features(
            teach.tokenizer(["cat", "a drawing of a rather long and winding caption of a cat"])
        )
        alone = model.text_features(teach.tokenizer(["cat"]))
        x = torch.randn(3, 3, 96, 96)
        images = model.image_features(x)
        torch.testing.assert_close(images[:1], model.image_features(x[:1]), atol=1e-4, rtol=1e-4)
        last = model.net.forward_head(model.net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(images[:, -1280:], last, atol=1e-4, rtol=1e-4)


@pytest.mark.prove
def test_the_demo_finds_concepts_that_it_never_saw(teach, tmp_path):
    """R@1 of the unseen concepts is 26 to 28% in both directions, where chance is 0.5%."""
    data = tmp_path / "emoji"
    taught = tmp_path / "taught"
    run = tmp_path / "run"
    build.build(data)
    teach.main([str(data / "train-*.tar"), "--out", str(taught)])
    config = EXAMPLES / "emoji" / "siclip-lite0.yaml"
    changes = [f"data.train={data}/train-*.tar", f"data.sidecars=[{taught}]", f"run.out={run}"]
    changes.append(f"eval.splits={{concepts: {data}/concepts-*.tar}}")
    sets = [word for change in changes for word in ("--set", change)]
    for command in (("train", config, *sets), ("evaluate", run)):
        result = call(*command)
        assert result.exit_code == 0, result.output
    figures = json.loads((run / "evaluation.json").read_text())["splits"]["concepts"]
    recall = [figures[way]["R@1"]["value"] for way in ("image_to_text", "text_to_image")]
    assert min(recall) > 0.2
    assert sum(recall) / 2 > 0.23


def test_domains_have_the_same_emoji_and_no_emoji_is_in_two_parts(few, out, monkeypatch):
    monkeypatch.setattr(domains, "concepts", lambda: few)
    monkeypatch.setattr(domains, "PARTS", {"test": 7, "valid": 5})
    counts = domains.build(out)
    groups = {}
    for split, count in counts.items():
        every = samples(out, split)
        pictures = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in every]
        # lines are black on white; most drawings of Twemoji have a colour
        colourful = sum(bool((picture != picture[..., :1]).any()) for picture in pictures)
        assert colourful == 0 if split.startswith("new") else colourful > count / 2
        assert min(int(picture.min()) for picture in pictures) < 100
        groups[split] = {json.loads(sample["json"])["group"] for sample in every}
        assert len(groups[split]) == count
    parts = [groups[f"old-{part}"] for part in ("test", "valid", "train")]
    assert [groups[f"new-{part}"] for part in ("test", "valid", "train")] == parts
    assert [len(part) for part in parts[:2]] == [7, 5]
    assert len(set().union(*parts)) == sum(map(len, parts)) <= KEPT
    made = digests(out)
    assert domains.build(out) == counts
    assert digests(out) == made


def test_emoji_with_the_same_lines_are_left_out(few):
    """Flags have a frame in common, and their colours alone differ."""
    flags = [sources.Concept(key, ["flag"], None, None) for key in ("1f1eb-1f1f7", "1f1ee-1f1f9")]
    lines = domains.LineVendor(sources.vendors()["openmoji"])
    assert domains.distinct([*flags, few[0]], lines) == [few[0]]
