"""Packing: rows that are bad, hostile files, and what is said of them."""

import datetime
import errno
import json
import os

import pytest
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.data import pack
from simplclip.data.errors import Skipped
from simplclip.data.rows import Options, open_source
from support.data.packs import packed, write_images, write_parquet
from support.data.pairs import members, png, table
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
        open_source(str(tmp_path))


def test_hostile_rows_are_counted(tmp_path):
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
    assert [*packed_files] == ["000000000.json", "000000000.png"]
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
    path.write_text('{"image": "a.png", "caption": "one"}\n')
    told = one_line("data", "pack", path, "--out", tmp_path / "none")
    missing = f"'{tmp_path}/a.png' does not exist; try --images"
    assert missing in told
    found, _ = packed(path, tmp_path / "out", Options(images=str(tmp_path / "in")))
    assert found == [("000000000", ["one"])]


def test_pictures_with_transparency_are_told(tmp_path, monkeypatch):
    """Also when nothing is left to pack; a picture that is left out is not counted."""
    monkeypatch.setattr(pack, "SAMPLES", 2)
    # black lines, and white where it is transparent
    clear = Image.frombytes("LA", (30, 30), bytes([0, 255, 255, 0]) * 450)
    pictures = {"1": photo(), "2": clear, "3": clear.convert("RGBA"), "5": clear}
    for name, picture in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(encode(picture, "PNG"))
        (tmp_path / f"{name}.txt").write_text("a picture" if name != "5" else "")
    warning = "warning: 2 with transparency, which the model does not see, such as "
    for start in ("packed 3 samples", "kept 3 samples"):
        output = call("data", "pack", tmp_path, "--out", tmp_path / "out").output
        assert start in output
        assert f"{warning}'{tmp_path}/2.png'; see Pixels in docs/data.md" in output


@pytest.mark.parametrize(
    ("captions", "texts", "reason"),
    [
        ([b"a cat", b"\xff"], ["a cat"], "caption not UTF-8"),
        ([["a cat", "two"], [None]], ["a cat", "two"], "missing caption"),
        ([7, None], ["7"], "missing caption"),
        ([datetime.datetime(2020, 1, 1), None], None, "missing caption"),
        ([{"text": "a cat"}, None], None, "missing caption"),
    ],
)
def test_captions_of_a_parquet_file_are_texts_or_numbers(tmp_path, captions, texts, reason):
    """Paths may be binary too."""
    write_images(tmp_path, "a.png", "b.png", "c.png")
    columns = {"image": [b"a.png", b"b.png", b"c.png"], "title": [*captions, captions[0]]}
    path = write_parquet(tmp_path / "t.parquet", columns)
    if texts is None:
        with pytest.raises(InputError, match="3 missing caption"):
            packed(path, tmp_path / "out")
        return
    found, skipped = packed(path, tmp_path / "out")
    assert found == [("000000000", texts), ("000000002", texts)]
    assert skipped == {reason: 1}


def test_a_damaged_parquet_file_is_named(tmp_path):
    texts = [f"a photo of {number % 7}" for number in range(300)]
    write_parquet(tmp_path / "t.parquet", {"filepath": texts, "title": texts})
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:100] + bytes(100) + whole[200:])
    with pytest.raises(InputError, match=r"expected a table, got '.*t.parquet': "):
        list(open_source(tmp_path / "t.parquet").rows(Skipped()))
