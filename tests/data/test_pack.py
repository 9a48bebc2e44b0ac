"""Packing: every form of pairs as shards."""

import json
import os
import re
import shutil
import tracemalloc
from collections import deque
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg

from simplclip import data
from simplclip.common.errors import InputError
from simplclip.data import pack, rows
from simplclip.data.errors import Skipped
from simplclip.data.rows import Options
from simplclip.data.transforms import ImageTransform
from support.data.packs import packed, samples, skipped_of, write_images, write_parquet
from support.data.pairs import loader, meta, png, table
from support.evaluation import batches_of

ROWS = [("img/a.png", "one"), ("img/a.png", "two"), ("img/sub/b.png", "three")]
TWO = [("000000000", ["one", "two"]), ("000000002", ["three"])]
IMAGES = [("img/a.png", ["one", "two"]), ("img/sub/b.png", ["three"])]
OTHER = Options(image_key="where", caption_key="what", images="img")
KINDS = {
    "rows.csv": (Options(), TWO),
    "rows.tsv": (Options(), TWO),
    "rows.parquet": (Options(), TWO),
    "rows.jsonl": (Options(), TWO),
    "imagefolder": (Options(), TWO),
    "imagefolder_csv": (Options(), TWO),
    "other.csv": (OTHER, TWO),
    "karpathy.json#val": (Options(), IMAGES),
    "coco.json": (Options(), IMAGES),
    "texts": (Options(), [("a", ["one", "two"]), ("b", ["two lines"])]),
    "classes": (Options(), [("cat_x/1", ["cat x"]), ("cat_x/2", ["cat x"]), ("dog/1", ["dog"])]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes the same images and captions in every form."""
    here = tmp_path_factory.mktemp("forms")
    pictures = ("img/a", "img/sub/b", "texts/a", "texts/b")
    pictures += ("classes/cat_x/1", "classes/cat_x/2", "classes/dog/1")
    write_images(here, *(f"{name}.png" for name in pictures))
    table(here / "rows.csv", ROWS)
    table(here / "rows.tsv", ROWS, separator="\t")
    others = [(text, path.removeprefix("img/")) for path, text in ROWS]
    table(here / "other.csv", others, ("what", "where"), ";")
    paths, texts = map(list, zip(*ROWS))
    columns = {"caption": texts, "image_path": paths}
    write_parquet(here / "rows.parquet", columns, row_group_size=2)
    for name in ("imagefolder", "imagefolder_csv"):
        shutil.copytree(here / "img", here / name / "img")
    objects = [json.dumps({"file_name": path, "text": text}) for path, text in ROWS]
    for name in ("rows.jsonl", "imagefolder/metadata.jsonl"):
        (here / name).write_text("\ufeff" + "\n\n".join(objects), "utf-8")
    table(here / "imagefolder_csv/metadata.csv", ROWS, ("file_name", "text"))
    split = [
        {"filepath": os.path.dirname(path), "filename": os.path.basename(path), "split": "val"}
        for path, _ in IMAGES
    ]
    for entry, (_, captions) in zip(split, IMAGES):
        entry["sentences"] = [{"raw": f" {text} "} for text in captions]
    gone = {"filename": "gone.png", "split": "train", "sentences": [{"raw": "not of this split"}]}
    images = [{"id": 7 + number, "file_name": path} for number, (path, _) in enumerate(IMAGES)]
    annotations = [{"image_id": 7 + (path != "img/a.png"), "caption": text} for path, text in ROWS]
    for name, content in (
        ("karpathy", {"images": [gone, *split]}),
        ("coco", {"images": images, "annotations": annotations}),
    ):
        mark = "\ufeff" if name == "coco" else ""
        (here / f"{name}.json").write_text(mark + json.dumps(content), "utf-8")
    record = {"captions": ["one", "two"], "group": "g", "label": "x"}
    (here / "texts/a.json").write_text(json.dumps(record))
    (here / "texts/b.txt").write_text("\ufefftwo\n lines\n", "utf-8")
    return here


@pytest.mark.parametrize("kind", KINDS)
def test_every_form(folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(folder)
    options, wanted = KINDS[kind]
    before = {*folder.rglob("*")}
    assert packed(kind, tmp_path / "out", options) == (wanted, {})
    first, *_ = samples(map(str, (tmp_path / "out").glob("*.tar"))).values()
    assert first["png"] == png({"texts": 2, "classes": 4}.get(kind, 0))  # the file's own bytes
    record = json.loads(first["json"])
    labels = {"texts": "x", "classes": "cat x"}
    groups = {"texts": "g", "classes": "cat x", "other.csv": "a.png"}
    groups |= {"karpathy.json#val": None, "coco.json": None}
    assert record.get("label") == labels.get(kind)
    assert record.get("group") == groups.get(kind, "img/a.png")
    assert meta(tmp_path / "out")["splits"]["data"]["samples"] == len(wanted)
    assert {*folder.rglob("*")} == before


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet", "imagefolder"])
def test_evaluation_reads_them_too(folder, kind):
    transform = ImageTransform(PreprocessCfg(size=8))
    ((images, held, _),), _ = batches_of(data.held_out(str(folder / kind)), transform)
    assert [(row.key, row.captions) for row in held] == TWO
    expected = [transform((folder / path).read_bytes()) for path, _ in IMAGES]
    assert torch.equal(images, torch.stack(expected))


def test_rows_of_json_lines_that_are_bad(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        {"image": "a.png", "caption": ["one", "two"]},
        {"image": None, "caption": ["x"]},
        {"image": "a.png"},
        {"image": "b.png", "caption": ["x"]},
        {"image": "a.png", "caption": ["last"]},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found, skipped = packed(path, tmp_path / "out")
    assert found == [("000000000", ["one", "two"]), ("000000004", ["last"])]
    assert skipped == {"missing image": 1, "missing caption": 1, "cannot be read": 1}


@pytest.mark.parametrize("file", [png(), {"bytes": png(), "path": None}])
def test_a_table_that_holds_files_of_images_is_refused(tmp_path, file):
    write_parquet(tmp_path / "t.parquet", {"image": [file], "text": ["a"]})
    message = r"usable in .*t.parquet'; 1 skipped: 1 missing image \(.*: expected a path, got .*PNG"
    assert re.search(message, refusal(tmp_path / "t.parquet"))


def test_another_metadata_file_names_no_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("one")
    table(tmp_path / "metadata.csv", [["Ansel", 1939]], ["photographer", "year"])
    assert packed(tmp_path, tmp_path / "out") == ([("a", ["one"])], {})


def test_rows_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    quoted = ['a "nail"', "over\ntwo lines", "with, comma", "\ufeff zwölf"]
    path = table(tmp_path / "odd.csv", [["a.png", text] for text in quoted])
    with open(path, "ab") as lines:
        lines.write(b"\n\r\n")  # empty lines
        lines.write(b'a.png,half a "quote\n')  # a quote inside a field that is not quoted
        lines.write(f"{tmp_path}/a.png,absolute\r\n".encode())
        lines.write(b"a.png,with a comma, not quoted\n")
        lines.write(b"alone\na.png,\n,no path\nnone.png,gone\na.png,\xff\xfe\n")
        lines.write(b"a.png,last")
    for workers in (1, 2):
        found, skipped = packed(path, tmp_path / f"out{workers}", workers=workers)
        cleaned = [" ".join(text.removeprefix("\ufeff").split()) for text in quoted]
        assert found[0] == ("000000000", [*cleaned, 'half a "quote', "absolute"])
        assert found[1:] == [("000000010", ["last"])]
        assert skipped.pop("bad row") == 2
        reasons = ("caption not UTF-8", "missing image", "cannot be read")
        # the row with an empty caption is one with the rows of its image before it
        assert skipped == dict.fromkeys(reasons, 1)


def refusal(path, **options):
    """Returns the error of packing `path`, which leaves no folder."""
    with pytest.raises(InputError) as caught:
        pack.pack(path, path.parent / "none", Options(**options), progress=False)
    assert not (path.parent / "none").exists()
    return str(caught.value)


def test_separators_and_wrong_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for separator in rows.SEPARATORS:
        path = table(tmp_path / "t.csv", [["a.png", "one"]], separator=separator)
        assert packed(path, tmp_path / f"out{ord(separator)}")[0] == [("000000000", ["one"])]
    (tmp_path / "list.json").write_bytes(b'[{"a": 1}]')
    instances = b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}'
    (tmp_path / "instances.json").write_bytes(instances)
    for name, content, message in (
        ("u.csv", "path,title\n".encode("utf-16"), "expected a table, got .*u.csv': "),
        ("p.parquet", b"PAR1", "expected a table, got .*p.parquet': "),
        ("j.json", b'{"a": 1}', "Karpathy's or COCO's JSON, got .*: without 'images'"),
        ("cut.json", b'{"images": [', "Karpathy's or COCO's JSON, got .*: Expecting"),
        ("k.json", b'{"images": [{"sentences": []}]}', "got .*: without 'filename'"),
        ("n.json", b'{"images": [5]}', "Karpathy's or COCO's JSON, got .*n.json': "),
        ("e.jsonl", b"\n", "expected a table, got .*e.jsonl': "),
        ("l.jsonl", b'["a"]\n', "expected a table, got .*l.jsonl': "),
        ("c.jsonl", b'{"text": "x"}\n', r"a column filepath or .* the columns 'text'"),
        ("d.json", b"[" * 100_000, "nested too deeply"),
        ("s.json", b'{"images": [{"split": "a"}, {"split": "b"}]}', "a, b, as .*#SPLIT, got none"),
        ("x.tar", b"", "in .csv, .tsv, .jsonl, .parquet, .json, got .*; training reads tars as"),
    ):
        (tmp_path / name).write_bytes(content)
        assert re.search(message, refusal(tmp_path / name))
    for name, options, message in (
        ("list.json", {}, "Karpathy's or COCO's JSON, got .*list.json': list indices"),
        ("s.json#c", {}, "splits a, b, as FILE.json#SPLIT, got c"),
        ("instances.json", {}, "got .*instances.json': without 'caption'"),
        ("none.csv", {}, "got '.*none.csv', which does not exist"),
        ("t.csv", {"image_key": "x"}, r"a column x \(image_key\), got .* the columns 'filepath'"),
        ("", {"image_key": "x"}, "image_key: expected none, as '.*' has no such part, got 'x'"),
        ("", {}, "got none that is usable in .*; 1 skipped: 1 missing caption"),
    ):
        assert re.search(message, refusal(tmp_path / name, **options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_large_table_is_held(tmp_path, kind):
    """Rows are a stream: reading 20,000 of them holds those of one piece."""
    path, count = str(tmp_path / f"t.{kind}"), 20_000
    columns = {
        "filepath": [f"images/{n:09d}.jpg" for n in range(count)],
        "title": [f"a photo of {n}" for n in range(count)],
    }
    if kind == "csv":
        table(path, zip(*columns.values()))
    else:
        write_parquet(path, columns)
    del columns
    source = rows.open_source(path)
    assert source.total == count
    tracemalloc.start()
    (last,) = deque(source.rows(Skipped()), maxlen=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.captions == [f"a photo of {count - 1}"]
    assert peak < 2_500_000  # all rows would take 8 MB


@pytest.mark.parametrize("captioned", [True, False])
def test_images_of_other_formats_are_read_or_counted(tmp_path, captioned):
    """Those that are not read are counted by suffix, unless they were converted beside."""
    folder = tmp_path / "photos" / "red"
    folder.mkdir(parents=True)
    forms = {"a.gif": "GIF", "b.TIFF": "TIFF", "c.tif": "TIFF", "d.bmp": "BMP", "e.jpg": "JPEG"}
    for name, form in forms.items():
        (folder / name).write_bytes(png(form=form))
    for name in ("e.heic", "f.HEIC", "g.heic", "h.jxl", "i.mov"):
        (folder / name).write_bytes(b"")
    if captioned:
        for key in "abcdefghi":
            (folder / f"{key}.txt").write_text("red")
    found, skipped = packed(tmp_path / "photos", out := tmp_path / "out")
    assert found == [(f"red/{key}", ["red"]) for key in "abcde"]
    assert skipped == {"heic image": 2, "jxl image": 1}
    assert "photos/red/f: not read; ImageMagick converts it, e.g. mogrify" in str(skipped_of(out))
    transform = ImageTransform(PreprocessCfg(size=8))
    for source in (str(out / "*.tar"), str(tmp_path / "photos")):
        (batch,), left_out = batches_of(data.held_out(source), transform)
        assert len(batch.images) == 5
    assert left_out.counts == skipped
    batch = next(iter(loader(str(out / "*.tar"), batch_size=5, transform=transform)))
    assert len({*batch["key"]}) == 5


def test_images_of_one_name_are_different_samples(tmp_path):
    write_images(tmp_path / "in/dog", "1.png", "1.JPG", "2.png")
    expected = [(name, ["dog"]) for name in ("dog/1", "dog/1", "dog/2")]
    assert packed(tmp_path / "in", tmp_path / "out")[0] == expected


def test_a_path_is_packed_and_other_data_stay(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for tars in ("a.tar", Path("b.tar"), "http://host/rows.csv", ["a.tar", "rows.csv"], {"x": 1}):
        assert pack.pack_shards(tars, tmp_path / "out") == tars
    shards = [str(tmp_path / "out/rows/rows-000000.tar")]
    for start, path in (("packed", "rows.csv"), ("kept", ["rows.csv"])):
        assert pack.pack_shards(path, tmp_path / "out") == shards
        assert capsys.readouterr().out.startswith(f"{start} 2 samples of rows.csv")
    (shard,) = pack.pack_shards("texts", tmp_path / "one")
    assert shard == str(tmp_path / "one/texts/texts-000000.tar")
