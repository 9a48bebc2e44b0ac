"""Packing: rows that are bad, hostile files, and what is said of them."""

import datetime
import errno
import itertools
import json
import os
import random
import sys
from collections import deque
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from simplclip.common.errors import InputError
from simplclip.data import pack, readers, write_tars
from simplclip.data.rows import Options
from support.data.packs import packed, write_images, write_parquet
from support.data.pairs import members, meta, png, table
from support.data.photos import encode, photo
from support.programs import call, one_line


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, "cat/a.png", "dog/a.png")
    scandir = os.scandir

    def refuse_dogs(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_dogs)  # root may read every folder
    message = r"folders that can be read, got '.*/dog': Permission denied"
    with pytest.raises(InputError, match=message):
        readers.open_source(str(tmp_path), Options())


# a field of fewer and of more characters than csv's limit
@pytest.mark.parametrize("rows", [9, 1500])
def test_a_quote_that_is_never_closed_costs_its_row(tmp_path, rows):
    lines = [[f"{number}.png", f"{number} {'x' * 100}"] for number in range(rows)]
    path = table(tmp_path / "t.csv", lines)
    Path(path).write_text(Path(path).read_text().replace("7.png,7 x", '7.png,"7 x', 1))
    found = list(readers.open_source(path, Options()).rows())
    assert [row.name for row in found if row.problem] == ["t.csv/000000007"]
    kept = [int(row.captions[0].split()[0]) for row in found if not row.problem]
    assert kept == [number for number in range(rows) if number != 7]


@pytest.mark.parametrize("below", ['a "quote" inside', '"quoted, whole"', '"text" behind'])
def test_a_quote_that_is_not_closed_does_not_end_at_a_quote_below(tmp_path, below):
    """The rows between would be part of its caption."""
    lines = ["filepath,title", 'a.png,"not closed', "b.png,between", f"c.png,{below}", "d.png,last"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    rows = list(readers.open_source(tmp_path / "t.csv", Options()).rows())
    assert [bool(row.problem) for row in rows] == [True, False, False, False]
    caption = {'"quoted, whole"': "quoted, whole", '"text" behind': "text behind"}.get(below, below)
    assert [row.captions[0].strip() for row in rows[1:]] == ["between", caption, "last"]


def test_hostile_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "MAX_BYTES", 1 << 20)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "text.png").write_bytes(b"root:x:0:0")
    (tmp_path / "torn.png").write_bytes(png()[:12])
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)
    images = ["good.png", "pipe.png", "/dev/zero", "/dev/stdin", "../../../../../../etc/passwd"]
    images += ["text.png", "torn.png", "huge.jpg", "a\0b.png", ".", "", "x" * 5000]
    images += ["http://x/y.jpg", "pipe:true"]
    entries = [{"filename": image, "sentences": [{"raw": image or "none"}]} for image in images]
    (tmp_path / "rows.json").write_text(json.dumps({"images": entries}))
    found, skipped = packed(tmp_path / "rows.json", tmp_path / "out")
    assert found == [("good.png", ["good.png"])]
    unreadable = {"cannot be read": 7, "not a local file": 2, "not an image": 3}
    assert skipped == unreadable | {"file too large": 1}
    packed_files = members(tmp_path / "out" / "rows-000000.tar")
    assert [*packed_files] == ["000000000.png", "000000000.json"]
    table(tmp_path / "urls.csv", [(f"https://x/{number}.jpg", "x") for number in range(3000)])
    told = one_line("data", "pack", tmp_path / "urls.csv", "--out", tmp_path / "none")
    first = "first: urls.csv/000000000: 'https://x/0.jpg', which is not a path; of URLs img2dataset"
    assert f"3000 not a local file ({first}" in told


def test_entries_of_json_files_that_are_incomplete_cost_no_other(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    images = [{"id": 1, "file_name": "a.png"}]
    annotations = [{"image_id": number, "caption": f"{number}"} for number in (1, 2)]
    coco = {"images": images, "annotations": annotations}
    entry = {"filename": "a.png", "sentences": [{"raw": "1"}]}
    karpathy = {"images": [{"filename": "b.png"}, entry]}
    for content, reason in ((coco, "cannot be read"), (karpathy, "missing caption")):
        path = tmp_path / f"{reason}.json"
        path.write_text(json.dumps(content))
        assert packed(path, tmp_path / reason) == ([("a.png", ["1"])], {reason: 1})


def test_images_that_lie_elsewhere_are_told_how_to_name_their_folder(tmp_path):
    write_images(tmp_path / "in", "a.png")
    path = tmp_path / "c.jsonl"
    path.write_text('{"image": "a.png", "caption": "one"}')
    told = one_line("data", "pack", path, "--out", tmp_path / "none")
    missing = f"'{tmp_path}/a.png' does not exist; try --images (in a config `images`)"
    assert missing in told
    found, _ = packed(path, tmp_path / "out", Options(images=str(tmp_path / "in")))
    assert found == [("000000000", ["one"])]


def test_pictures_with_transparency_and_of_one_colour_are_told(tmp_path, monkeypatch):
    """Also when nothing is left to pack; a picture that is left out is not counted."""
    monkeypatch.setattr(pack, "SAMPLES", 2)
    # black lines, and white where it is transparent
    clear = Image.frombytes("LA", (30, 30), bytes([0, 255, 255, 0]) * 450)
    pictures = {
        "1": photo(),
        "2": clear,
        "3": clear.convert("RGBA"),
        "4": Image.new("RGB", (30, 30), "red"),
        "5": clear,
    }
    for name, picture in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(encode(picture, "PNG"))
        (tmp_path / f"{name}.txt").write_text("a picture" if name != "5" else "")
    command = ("data", "pack", tmp_path, "--out", tmp_path / "out")
    transparent = "with transparency, which the model does not see"
    uniform = "of one colour as the model sees them"
    example = f"such as '{tmp_path}/2.png'; see Pixels in docs/data.md"
    for start in ("packed 4 samples", "kept 4 samples"):
        output = call(*command).output
        assert start in output
        assert f"warning: 2 {transparent}, {example}" in output
        assert f"warning: 3 {uniform}, {example}" in output
    entries = meta(tmp_path / "out")["splits"]["data"]["shards"].values()
    assert write_tars.skipped_in(entries, "remarks").counts == {transparent: 2, uniform: 3}
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo/1.png").write_bytes(encode(photo(), "PNG"))
    (tmp_path / "photo/1.txt").write_text("a photo")
    output = call("data", "pack", tmp_path / "photo", "--out", tmp_path / "plain").output
    assert "docs/data.md" not in output


def test_photos_that_exif_turns_are_told(tmp_path):
    """As phones write them; EXIF that is damaged, or says nothing of it, is no matter."""
    contents = {"damaged": b"Exif\0\0II*\0\xff\xff\xff\xff"}
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        contents[str(orientation)] = exif.tobytes()
    for (name, exif), form in itertools.product(contents.items(), ("JPEG", "PNG", "WEBP")):
        path = tmp_path / "photos" / f"{name}-{form}.{form.lower()}"
        path.parent.mkdir(exist_ok=True)
        photo().save(path, form, exif=exif)
        path.with_suffix(".txt").write_text("a photo")
    output = call("data", "pack", tmp_path / "photos", "--out", tmp_path / "out").output
    assert "packed 12 samples" in output
    first = tmp_path / "photos" / "3-JPEG.jpeg"
    assert f"6 turned by EXIF, which the model does not heed, such as '{first}'; see" in output


@pytest.mark.slow
def test_a_damaged_parquet_file_is_named(tmp_path):
    texts = [f"a photo of {number % 7}" for number in range(300)]
    write_parquet(tmp_path / "t.parquet", {"filepath": texts, "title": texts})
    whole = (tmp_path / "t.parquet").read_bytes()
    draw = random.Random(0)
    damaged = []
    for _ in range(150):
        file = bytearray(whole)
        file[draw.randrange(len(file))] = draw.randrange(256)
        (tmp_path / "t.parquet").write_bytes(file)
        try:
            deque(readers.open_source(tmp_path / "t.parquet", Options()).rows())
        except InputError as error:
            damaged.append(str(error))
    assert damaged
    assert all("t.parquet" in message for message in damaged)


@pytest.mark.parametrize(
    ("captions", "texts", "reason"),
    [
        ([b"a cat", b"\xff"], ["a cat"], "caption not UTF-8"),
        ([["a cat", "two"], [None]], ["a cat", "two"], "missing caption"),
        ([[b"a cat", b"two"], [b"x", b"\xff"]], ["a cat", "two"], "caption not UTF-8"),
        ([7, None], ["7"], "missing caption"),
        ([datetime.datetime(2020, 1, 1), None], None, "missing caption"),
        ([{"text": "a cat"}, None], None, "missing caption"),
        ([True, False], None, "missing caption"),
    ],
)
def test_captions_of_a_parquet_file_are_texts_or_numbers(tmp_path, captions, texts, reason):
    """Paths may be binary too, and files of images stand among them."""
    write_images(tmp_path, "a.png", "b.png", "c.png")
    columns = {
        "image": [b"a.png", b"b.png", png(), b"c.png"],
        "title": [*captions, captions[0], captions[0]],
    }
    path = write_parquet(tmp_path / "t.parquet", columns)
    problem = reason if reason == "caption not UTF-8" else None
    rows = list(readers.open_source(path, Options()).rows())
    assert [row.problem and row.problem[0] for row in rows] == [None, problem, None, None]
    if texts is None:
        with pytest.raises(InputError, match="4 missing caption"):
            packed(path, tmp_path / "out")
        return
    found, skipped = packed(path, tmp_path / "out")
    assert found == [("000000000", texts), ("000000002", texts), ("000000003", texts)]
    assert skipped == {reason: 1}


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    line = one_line("data", "pack", tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert line.endswith("needs the package pyarrow: pip install 'simplclip[data]'")
