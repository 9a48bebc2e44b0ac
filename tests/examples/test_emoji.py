"""examples/emoji: the pairs that build.py writes, the held-out part, and the teacher that teach.py makes of them."""

import collections
import io
import json
import random

import example
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from pairs import digests, meta
from PIL import Image

build = example.load("emoji/build")
teach = example.load("emoji/teach")
sources = example.load("emoji/sources")

KEPT = 60  # concepts in the small builds
HELD_OUT = 10


@pytest.fixture(scope="module")
def few():
    """Takes a cross-section of the concepts, so that a build takes a fraction of a second."""
    every = build.concepts()
    return every[:: len(every) // KEPT][:KEPT]


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
    return [s for path in sorted(folder.glob(f"{split}-*.tar")) for s in wds.WebDataset(str(path), shardshuffle=False)]


def records(folder, split):
    return [json.loads(sample["json"]) for sample in samples(folder, split)]


def test_concepts():
    every = {concept.key: concept for concept in build.concepts()}
    assert len(every) > 1800
    assert list(every) == sorted(every)
    assert not any(tone in key.split("-") for key in every for tone in ("fe0f", "1f3fb", "1f3ff"))
    names = [concept.captions[0] for concept in every.values()]
    assert len(set(names)) == len(names)
    heart, sweden = every["2764"], every["1f1f8-1f1ea"]
    assert (heart.captions[0], heart.group) == ("red heart", "Smileys & Emotion")
    assert {"heart", "an emoji of red heart"} <= set(heart.captions)
    assert (sweden.captions[0], sweden.group) == ("flag of Sweden", "Flags")
    assert "Sweden" in sweden.captions
    assert every["1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"].captions[0] == "flag of Wales"
    assert sum(concept.group is None for concept in every.values()) < 30
    assert all(len(set(c.captions)) == len(c.captions) >= 3 and all(c.captions) for c in every.values())
    owners = {}
    for concept in every.values():
        for caption in concept.captions:
            assert owners.setdefault(caption.lower(), concept.key) == concept.key, caption


def test_a_build_holds_what_its_summary_says(small, out, few):
    summary = build.build(out)
    assert summary == meta(out)
    shards = [*(f"train-{i:06d}.tar" for i in range(4)), "concepts-000000.tar"]
    assert {path.name for path in out.iterdir()} == {*shards, "LICENSES.md", "meta.json"}
    for split, number in (("train", KEPT - HELD_OUT), ("concepts", HELD_OUT)):
        found, entry = records(out, split), summary["splits"][split]
        assert entry["samples"] == len(found) == 2 * number == 2 * len({record["group"] for record in found})
        assert {record["vendor"] for record in found} == {"openmoji", "twemoji"}
        for name, shard in entry["shards"].items():
            assert (out / name).stat().st_size == shard["bytes"]
            assert sum(1 for _ in wds.WebDataset(str(out / name), shardshuffle=False)) == shard["samples"]
    held_out, train = ({record["group"] for record in records(out, split)} for split in ("concepts", "train"))
    assert held_out == set(summary["held_out_concepts"])
    assert not held_out & train
    concepts, drawings = {concept.key: concept for concept in few}, collections.defaultdict(set)
    for sample in (*samples(out, "train"), *samples(out, "concepts")):
        record = json.loads(sample["json"])
        concept = concepts[record["group"]]
        assert sample["__key__"] == f"{record['vendor']}/{concept.key}"
        assert (record["captions"], sample["txt"].decode()) == (concept.captions, concept.captions[0])
        assert record.get("label") == concept.group
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.size, image.mode) == ((72, 72), "RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255) or concept.group == "Flags" or "black" in str(concept.captions)
        drawings[concept.key].add(sample["png"])
    assert {len(pair) for pair in drawings.values()} == {2}  # each vendor draws differently
    licences = (out / "LICENSES.md").read_text()
    assert "CC-BY-4.0" in licences
    assert "CC-BY-SA-4.0" in licences
    assert "OFL" not in licences


def test_a_third_vendor_is_held_out(font, out):
    build.build(out)
    train, vendor = ({record["group"] for record in records(out, split)} for split in ("train", "vendor"))
    assert vendor <= train
    assert {record["vendor"] for record in records(out, "vendor")} == {"noto"}
    assert len(vendor) > 0.9 * (KEPT - HELD_OUT)
    assert any("-" in key for key in vendor)  # some emoji are ligatures
    assert "SIL Open Font License" in (out / "LICENSES.md").read_text()
    # Bitmaps are found by the font's tables, not by position: the red heart is red and the green heart green.
    noto = sources.noto(sources.find_font())
    for key, channel in (("2764", 0), ("1f49a", 1), ("1f499", 2)):
        pixel = sources.square(noto.draw(sources.Concept(key, [], None, None))).getpixel((36, 36))
        assert pixel.index(max(pixel)) == channel
    assert not noto.has(sources.Concept("1f600-1f600", [], None, None))


def test_a_font_without_bitmaps_gives_no_vendor(small, out, monkeypatch, capsys, tmp_path):
    from fontTools.fontBuilder import FontBuilder

    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    monkeypatch.setattr(build, "find_font", lambda: tmp_path / "font.ttf")
    build.main(["--out", str(out)])
    assert "vendor" not in meta(out)["splits"]
    assert "apt-get install -y fonts-noto-color-emoji" in capsys.readouterr().out


@pytest.mark.slow
def test_swapped_captions(small, tmp_path):
    """A share of the training pairs exchange captions, and nothing else differs."""
    build.build(tmp_path / "clean")
    build.build(tmp_path / "noisy", swap=0.3)
    pairs = list(zip(records(tmp_path / "clean", "train"), records(tmp_path / "noisy", "train"), strict=True))
    swapped = [(before, after) for before, after in pairs if after.get("swapped")]
    assert len(swapped) == round(0.3 * len(pairs))
    assert all(before == after for before, after in pairs if not after.get("swapped"))
    captions = {before["group"]: before["captions"] for before, _ in pairs}
    for before, after in swapped:
        assert after["group"] != before["group"]
        assert after["captions"] == captions[after["group"]]
        assert (after["vendor"], after.get("label")) == (before["vendor"], before.get("label"))
    assert sorted(before["group"] for before, _ in swapped) == sorted(after["group"] for _, after in swapped)
    name = "concepts-000000.tar"
    assert digests(tmp_path / "noisy")[name] == digests(tmp_path / "clean")[name]
    with pytest.raises(SystemExit, match="--swap: expected 0, or a share that swaps at least a few of 100 pairs, got 0.01"):
        build.build(tmp_path / "none", swap=0.01)


def test_builds_repeat_are_kept_and_touch_no_other_files(small, out, tmp_path, monkeypatch):
    (out.with_name("out.unfinished")).mkdir()  # of a process that was killed
    (out.with_name("out.unfinished") / "train-000000.tar").write_text("half")
    build.build(out)
    born = (out / "meta.json").stat().st_ino
    assert build.build(out) == meta(out)
    assert (out / "meta.json").stat().st_ino == born
    random.seed(99)
    monkeypatch.setattr("time.time", lambda: 4e9)
    build.build(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)
    with pytest.raises(SystemExit, match="out: expected a new folder, or a build of the same settings"):
        build.build(out, swap=0.3)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="thesis: expected a new folder"):
        build.build(tmp_path / "thesis")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again", "thesis"}


def separable(number=64):
    """Returns features that tell which pairs belong together; two captions each, two pairs of each group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(number) // 2
    codes = torch.randn(number // 2, 24, generator=generator)
    images = codes[groups] @ torch.randn(24, example.load("emoji/teacher").IMAGE_FEATURES, generator=generator)
    texts = codes @ torch.randn(24, teach.TEXT_FEATURES, generator=generator)
    texts = torch.cat([texts, texts + 0.1 * torch.randn(texts.shape, generator=generator)])
    return teach.Features(images[None], texts, [[g, g + number // 2] for g in groups.tolist()], groups)


def test_heads_learn_align_and_repeat(monkeypatch):
    monkeypatch.setattr(teach, "STEPS", 25)
    monkeypatch.setattr(teach, "BATCH", 48)
    pairs, made = separable(), []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(teach.Heads())
        teach.fit(made[-1], pairs, random.Random(0), torch.device("cpu"))
    first, again = made
    x, y = F.normalize(first.image(pairs.images[0]), dim=-1), F.normalize(first.text(pairs.texts[:32]), dim=-1)
    assert ((x @ y.T).argmax(1) == pairs.groups).float().mean() > 0.95
    assert first.logit_scale.exp() <= teach.MAX_SCALE + 1e-3
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))


def test_pairs_of_a_group_are_no_negatives(monkeypatch):
    """The loss gets the groups as ids, so that pairs of a group do not repel each other."""
    ids, loss = [], teach.ClipPMLoss.forward
    monkeypatch.setattr(teach.ClipPMLoss, "forward", lambda s, *a, **k: ids.append(k["ids"]) or loss(s, *a, **k))
    monkeypatch.setattr(teach, "STEPS", 1)
    teach.fit(teach.Heads(), separable(8), random.Random(0), torch.device("cpu"))
    assert sorted(ids[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_views_differ_a_little_on_white():
    image = torch.ones(2, 3, 96, 96)
    image[:, :, 30:60, 30:60] = -1
    torch.manual_seed(0)
    views = teach.augmented(image)
    assert not torch.equal(views[0], views[1])
    assert views.min() >= -1
    assert views.max() <= 1
    assert (views[0, :, 0, 0] > 0.1).all()


@pytest.mark.slow
def test_a_teacher_of_a_build_and_the_same_heads_for_another(small, out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teach, "STEPS", 20)
    monkeypatch.setattr(teach, "BATCH", 32)
    build.build(out)
    taught, encoded = tmp_path / "taught", []
    features = teach.Teacher.image_features
    monkeypatch.setattr(teach.Teacher, "image_features", lambda self, x: encoded.append(len(x)) or features(self, x))
    arguments = [str(out / "train-*.tar"), "--out", str(taught)]
    teach.main(arguments)
    assert sum(encoded) == (1 + teach.VIEWS) * 100  # each image and each view once
    assert "features of 100 images" in capsys.readouterr().out
    about = meta(taught)
    assert (about["teacher"]["width"], about["splits"]["train"]["samples"]) == (teach.WIDTH, 100)
    right = []
    for shard in sorted(out.glob("train-*.tar")):
        pairs = zip(
            wds.WebDataset(str(shard), shardshuffle=False), wds.WebDataset(str(taught / shard.name), shardshuffle=False)
        )
        for sample, sidecar in pairs:
            rows = np.load(io.BytesIO(sidecar["teacher.npy"]))
            assert sidecar["__key__"] == sample["__key__"]
            assert (rows.dtype, len(rows)) == (np.float16, 1 + len(json.loads(sample["json"])["captions"]))
            rows = rows.astype(np.float32)
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-2)
            right.append((rows[1:] @ rows[0]).mean())
    assert np.mean(right) > 0.2
    teach.main(arguments)
    assert "is complete and is kept" in capsys.readouterr().out

    encoded.clear()
    again = ["--out", str(tmp_path / "again"), "--heads", str(taught / "heads.safetensors")]
    teach.main([str(out / "train-*.tar"), *again])
    assert sum(encoded) == 100
    for name in about["splits"]["train"]["shards"]:
        for one, other in zip(
            wds.WebDataset(str(taught / name), shardshuffle=False),
            wds.WebDataset(str(tmp_path / "again" / name), shardshuffle=False),
        ):
            one, other = (np.load(io.BytesIO(s["teacher.npy"])).astype(np.float32) for s in (one, other))
            np.testing.assert_allclose(one, other, atol=2e-3)


def test_padding_and_company_do_not_change_features():
    model = teach.Teacher(teach.Heads())
    with torch.no_grad():
        both = model.text_features(teach.tokenizer(["cat", "a drawing of a rather long and winding caption of a cat"]))
        alone = model.text_features(teach.tokenizer(["cat"]))
        x = torch.randn(3, 3, 96, 96)
        images = model.image_features(x)
        torch.testing.assert_close(images[:1], model.image_features(x[:1]), atol=1e-4, rtol=1e-4)
        last = model.net.forward_head(model.net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(images[:, -1280:], last, atol=1e-4, rtol=1e-4)
