"""Packing: every form of pairs as shards, rows that are bad, hostile files, and stops at any
moment.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import deque
from pathlib import Path

import pytest
from pairs import call, digests, killed_at_any_point, members, meta, one_line, png, table
from photos import encode, photo
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.data import pack, read_tables, write_tars
from simplclip.data.read_tables import Options

ROWS = [("img/a.png", "one"), ("img/a.png", "two"), ("img/sub/b.png", "three")]
TWO = [("000000000", ["one", "two"]), ("000000002", ["three"])]
IMAGES = [("img/a.png", ["one", "two"]), ("img/sub/b.png", ["three"])]
OTHER = Options(image_key="where", caption_key="what", images="img")
KINDS = {
    "rows.csv": (Options(), TWO),
    "rows.tsv": (Options(), TWO),
    "rows.parquet": (Options(), TWO),
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
    for number, name in enumerate(
        (
            "img/a",
            "img/sub/b",
            "texts/a",
            "texts/b",
            "classes/cat_x/1",
            "classes/cat_x/2",
            "classes/dog/1",
        )
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / f"{name}.png").write_bytes(png(number))
    table(here / "rows.csv", ROWS)
    table(here / "rows.tsv", ROWS, separator="\t")
    table(
        here / "other.csv",
        [(text, path.removeprefix("img/")) for path, text in ROWS],
        ("what", "where"),
        ";",
    )
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    paths, texts = map(list, zip(*ROWS))
    parquet.write_table(
        pyarrow.table({"caption": texts, "image_path": paths}),
        here / "rows.parquet",
        row_group_size=2,
    )
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
        (here / f"{name}.json").write_text(
            "\ufeff" * (name == "coco") + json.dumps(content), "utf-8"
        )
    (here / "texts/a.json").write_text(
        json.dumps({"captions": ["one", "two"], "group": "g", "label": "x"})
    )
    (here / "texts/b.txt").write_text("\ufefftwo\n lines\n", "utf-8")
    return here


def samples(shards):
    """Returns the files of the samples of shards, by key."""
    found = {}
    for shard in shards:
        for name, content in members(shard).items():
            found.setdefault(name[:9], {})[name[10:]] = content
    return found


def skipped_of(out):
    return write_tars.skipped_in(meta(out)["splits"]["data"]["shards"].values())


def packed(source, out, options=Options(), **more):  # noqa: B008
    """Returns (name, captions) of each sample, and what was left out."""
    shards = pack.pack(source, out, options, progress=False, **more)
    records = [json.loads(sample["json"]) for sample in samples(shards).values()]
    skipped = dict(skipped_of(out).counts)
    return [(record["source"].partition("/")[2], record["captions"]) for record in records], skipped


@pytest.mark.parametrize("kind", KINDS)
def test_every_form(folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(folder)
    options, wanted = KINDS[kind]
    before = {*folder.rglob("*")}
    assert packed(kind, tmp_path / "out", options) == (wanted, {})
    shards = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    first, *_ = samples(shards).values()
    assert first["png"] == png({"texts": 2, "classes": 4}.get(kind, 0))  # the file's own bytes
    record = json.loads(first["json"])
    assert (record.get("group"), record.get("label")) == {
        "texts": ("g", "x"),
        "classes": ("cat x",) * 2,
    }.get(kind, (None,) * 2)
    assert meta(tmp_path / "out")["splits"]["data"]["samples"] == len(wanted)
    assert {*folder.rglob("*")} == before


def test_rows_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    quoted = ['a "nail"', "over\ntwo lines", "with, comma", 'unclosed " inside', "\ufeff zwölf"]
    path = table(tmp_path / "odd.csv", [["a.png", text] for text in quoted])
    with open(path, "ab") as lines:
        lines.write(b"\n\r\n")  # empty lines
        lines.write(b'a.png,half a "quote\n')  # a quote inside a field that is not quoted
        lines.write(f"{tmp_path}/a.png,absolute\r\n".encode())
        lines.write(b"a.png,with a comma, not quoted\n")
        lines.write(b"alone\na.png,\n,no path\nnone.png,gone\na.png,\xff\xfe\n")
        lines.write(b"\x00\r\x00,a.png\na.png,last")
    found, skipped = packed(path, tmp_path / "out")
    cleaned = [" ".join(text.removeprefix("\ufeff").split()) for text in [*quoted, 'half a "quote']]
    assert found[0] == ("000000000", [*cleaned, "absolute"])  # neighbouring rows of one image
    assert found[1:] == [("000000014", ["last"])]
    # The reason of the row with NUL depends on Python's version.
    assert skipped.pop("bad row") + skipped.pop("cannot be read") == 4
    assert skipped == {"caption not UTF-8": 1, "empty caption": 1, "missing image": 1}


def test_separators_and_wrong_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for separator in read_tables.SEPARATORS:
        path = table(tmp_path / "t.csv", [["a.png", "one"]], separator=separator)
        assert packed(path, tmp_path / f"out{ord(separator)}")[0] == [("000000000", ["one"])]
    for name, content, options, message in (
        (
            "t.csv",
            None,
            Options(image_key="x"),
            r"a column x \(image_key\), got '.*t.csv' with the columns 'filepath'",
        ),
        (
            "u.csv",
            "path,title\n".encode("utf-16"),
            Options(),
            "in UTF-16: iconv -f UTF-16 -t UTF-8",
        ),
        ("p.parquet", b"PAR1", Options(), "expected a parquet file, got"),
        (
            "j.json",
            b'{"a": 1}',
            Options(),
            "as in Karpathy's or COCO's JSON, got .*KeyError: 'images'",
        ),
        ("d.json", b"[" * 100_000, Options(), "nested too deeply"),
        (
            "s.json",
            b'{"images": [{"split": "a"}, {"split": "b"}]}',
            Options(),
            "splits a, b, as .*s.json#a, got none",
        ),
        (
            "x.tar",
            b"",
            Options(),
            "that ends in .csv, .tsv, .parquet or .json, got .*; training reads tars as they are",
        ),
        ("none.csv", None, Options(), "got '.*none.csv', which does not exist"),
        (
            "",
            None,
            Options(image_key="x"),
            "image_key: expected none, as '.*' has no such part, got 'x'",
        ),
        ("t.csv", None, Options(split="x"), "split: expected none"),
        ("", None, Options(), "got none that is usable in .*; 1 skipped: 1 missing caption"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            pack.pack(tmp_path / name, tmp_path / "out", options, progress=False)
        assert not (tmp_path / "out").exists()


# a field of fewer and of more characters than csv's limit
@pytest.mark.parametrize("rows", [9, 1500])
def test_a_quote_that_is_never_closed_costs_its_row(tmp_path, rows):
    path = table(
        tmp_path / "t.csv", [[f"{number}.png", f"{number} {'x' * 100}"] for number in range(rows)]
    )
    Path(path).write_text(Path(path).read_text().replace("7.png,7 x", '7.png,"7 x', 1))
    found = list(read_tables.open_source(path, Options()).rows())
    assert [row.name for row in found if row.problem] == ["t.csv/000000007"]
    assert [row.captions[0].split()[0] for row in found if not row.problem] == [
        str(n) for n in range(rows) if n != 7
    ]


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
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").table(columns), path
        )
    del columns
    tracemalloc.start()
    source = read_tables.open_source(path, Options())
    assert source.total == count
    (last,) = deque(source.rows(), maxlen=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.captions == [f"a photo of {count - 1}"]
    assert peak < 2_500_000  # all rows would take 8 MB


def test_hostile_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "MAX_BYTES", 1 << 20)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "text.png").write_bytes(b"root:x:0:0")
    (tmp_path / "torn.png").write_bytes(png()[:12])
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)
    images = [
        "good.png",
        "pipe.png",
        "/dev/zero",
        "/dev/stdin",
        "../../../../../../etc/passwd",
        "text.png",
        "torn.png",
        "huge.jpg",
        "a\0b.png",
        ".",
        "",
        "http://x/y.jpg",
        "pipe:true",
        "x" * 5000,
    ]
    entries = [{"filename": image, "sentences": [{"raw": image or "none"}]} for image in images]
    (tmp_path / "rows.json").write_text(json.dumps({"images": entries}))
    found, skipped = packed(tmp_path / "rows.json", tmp_path / "out")
    assert found == [("good.png", ["good.png"])]
    unreadable = {
        "cannot be read": 7,
        "file too large": 1,
        "not a local file": 2,
        "not an image": 3,
    }
    assert skipped == unreadable
    assert list(members(tmp_path / "out" / "rows-000000.tar")) == [
        "000000000.png",
        "000000000.json",
    ]
    table(tmp_path / "urls.csv", [(f"https://x/{number}.jpg", "x") for number in range(3000)])
    told = one_line("data", "pack", tmp_path / "urls.csv", "--out", tmp_path / "none")
    assert (
        "3000 not a local file (first: urls.csv/000000000: 'https://x/0.jpg', which is not a path; "
        "of URLs img2dataset" in told
    )


def test_a_folder_whose_captions_change_is_another_source(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_bytes(png())
    for text in ("a cat", "a dog"):
        (tmp_path / "in/1.txt").write_text(text)
        os.utime(tmp_path / "in/1.txt", (len(text), ord(text[2])))
        if text == "a cat":
            assert packed(tmp_path / "in", tmp_path / "out") == ([("1", ["a cat"])], {})
    with pytest.raises(InputError, match="to hold what an earlier run made of the same"):
        packed(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "entries", [5, [], {"in-000000.tar": 5}, {"in-000000.tar": {"samples": "7", "bytes": 1}},
                {"in-000000.tar": {"samples": 7, "bytes": 1, "skipped": 5}}]
)  # fmt: skip
def test_another_meta_json_is_refused(tmp_path, rows, entries):
    packed(rows, tmp_path / "out")
    path = tmp_path / "out/meta.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"splits": {"data": {"shards": entries}}})
    )
    with pytest.raises(
        InputError,
        match="expected a new folder or that of an earlier run, got .* with another meta.json",
    ):
        packed(rows, tmp_path / "out")


def test_a_run_in_the_folder_of_its_data_does_not_change_them(tmp_path):
    """Its pictures have no captions beside them."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.txt").write_text("a cat")
    for name in ("1.png", "curves.png"):
        (tmp_path / "in" / name).write_bytes(png())
        assert packed(tmp_path / "in", tmp_path / "out") == ([("1", ["a cat"])], {})


def test_entries_of_json_files_that_are_incomplete_cost_no_other(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": n, "caption": f"{n}"} for n in (1, 2)],
    }
    karpathy = {
        "images": [{"filename": "b.png"}, {"filename": "a.png", "sentences": [{"raw": "1"}]}]
    }
    for name, content, reason in (
        ("c", coco, "cannot be read"),
        ("k", karpathy, "missing caption"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert packed(tmp_path / f"{name}.json", tmp_path / name) == (
            [("a.png", ["1"])],
            {reason: 1},
        )


def test_images_that_lie_elsewhere_are_told_how_to_name_their_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png())
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "one"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    told = one_line("data", "pack", tmp_path / "c.json", "--out", tmp_path / "none")
    missing = f"'{tmp_path}/a.png' does not exist; try --images (in a config `images`)"
    assert missing in told
    assert packed(tmp_path / "c.json", tmp_path / "out", Options(images=str(tmp_path / "in"))) == (
        [("a.png", ["one"])],
        {},
    )


def test_pictures_with_transparency_and_of_one_colour_are_told(tmp_path, monkeypatch):
    """Several shards and processes, and again when nothing is left to pack; a picture that is left
    out is not counted.
    """
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
    for start in ("packed 4 samples", "kept 4 samples"):
        output = call(*command).output
        assert start in output
        assert (
            f"2 with transparency, which the model does not see, such as '{tmp_path}/2.png'; see "
            "Pixels in docs/" in output
        )
        assert (
            f"3 of one colour as the model sees them, such as '{tmp_path}/2.png'; see Pixels in "
            "docs/data.md" in output
        )
    remarks = write_tars.skipped_in(
        meta(tmp_path / "out")["splits"]["data"]["shards"].values(), "remarks"
    )
    assert remarks.counts == {
        "with transparency, which the model does not see": 2,
        "of one colour as the model sees them": 3,
    }
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo/1.png").write_bytes(encode(photo(), "PNG"))
    (tmp_path / "photo/1.txt").write_text("a photo")
    assert (
        "docs/data.md"
        not in call("data", "pack", tmp_path / "photo", "--out", tmp_path / "plain").output
    )


@pytest.mark.slow
def test_a_damaged_parquet_file_is_named(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts = [f"a photo of {number % 7}" for number in range(300)]
    parquet.write_table(pyarrow.table({"filepath": texts, "title": texts}), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    draw = random.Random(0)
    damaged = []
    for _ in range(150):
        file = bytearray(whole)
        file[draw.randrange(len(file))] = draw.randrange(256)
        (tmp_path / "t.parquet").write_bytes(file)
        try:
            deque(read_tables.open_source(tmp_path / "t.parquet", Options()).rows())
        except InputError as error:
            damaged.append(str(error))
    assert damaged
    assert all("t.parquet" in message for message in damaged)


def test_images_of_one_name_are_different_samples(tmp_path):
    (tmp_path / "in/dog").mkdir(parents=True)
    for name in ("1.png", "1.JPG", "2.png"):
        (tmp_path / "in/dog" / name).write_bytes(png())
    assert packed(tmp_path / "in", tmp_path / "out")[0] == [
        ("dog/1", ["dog"]),
        ("dog/1", ["dog"]),
        ("dog/2", ["dog"]),
    ]


def test_links_to_folders(tmp_path):
    """A class may be a link to a folder; a link to its own parent or to the disk's root costs
    nothing.
    """
    (tmp_path / "all/dog/deep").mkdir(parents=True)
    for name in ("all/dog/1.png", "all/dog/deep/2.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "some").mkdir()
    for name, target in (("dog", "../all/dog"), ("root", "/"), ("self", ".")):
        (tmp_path / "some" / name).symlink_to(target, target_is_directory=True)
    assert packed(tmp_path / "some", tmp_path / "out")[0] == [("dog/1", ["dog"])]


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    line = one_line("data", "pack", tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert line.endswith("needs the package pyarrow: pip install 'simplclip[data]'")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Writes a table of 10 rows, every third of them bad; a shard has 4 rows."""
    monkeypatch.setattr(pack, "SAMPLES", 4)
    (tmp_path / "in").mkdir()
    for number in range(10):
        (tmp_path / f"in/{number}.png").write_bytes(png(number) if number % 3 else b"none")
    return table(
        tmp_path / "in/t.csv", [(f"{number}.png", f"number {number}") for number in range(10)]
    )


@pytest.mark.slow
def test_killed_at_any_point(tmp_path, rows):
    def work(out, step):
        step()
        pack.pack(rows, out, workers=1, progress=False)

    killed_at_any_point(tmp_path, work, 40)
    assert skipped_of(tmp_path / "whole").counts["not an image"] == 4
    pack.pack(rows, tmp_path / "parallel", workers=3, progress=False)
    assert digests(tmp_path / "parallel") == digests(tmp_path / "whole")


def test_shards_are_found_again_until_the_source_changes(tmp_path, rows):
    command = ("data", "pack", rows, "--out", tmp_path / "out")
    first = call(*command)
    assert first.exit_code == 0, first.output
    assert "packed 6 samples of t.csv in 3 shards" in first.output
    assert (
        "4 skipped: 4 not an image (first: t.csv/000000000: 4 bytes that are not jpg, png or webp)"
        in first.output
    )
    assert "words: median 2, 95 % up to 2, at most 2" in first.output
    assert "t.csv/000000001: number 1" in first.output
    before = digests(tmp_path / "out")
    assert "kept 6 samples of t.csv" in call(*command).output
    assert digests(tmp_path / "out") == before
    (tmp_path / "out/t-000001.tar").unlink()
    assert "packed 6 samples" in call(*command).output
    assert digests(tmp_path / "out") == before
    for change in (
        lambda: call(*command, "--caption-key", "title"),
        lambda: os.utime(rows, (0, 0)) or call(*command),
    ):
        output = change().output
        assert "to hold what an earlier run made of the same" in output
        assert "remove it or choose another folder" in output


def test_shards_that_are_made_again_are_missing_until_they_are(tmp_path, rows, monkeypatch):
    def fails(paths, first, *rest):
        if first == 8:
            raise KeyboardInterrupt
        return write(paths, first, *rest)

    write, out = pack._write_shard, tmp_path / "out"
    packed(rows, out)
    before = digests(out)
    for name in ("t-000001.tar", "t-000002.tar"):
        (out / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_write_shard", fails)
        with pytest.raises(KeyboardInterrupt):
            packed(rows, out, workers=1)
    packed(rows, out)
    assert digests(out) == before


def test_a_folder_that_holds_something_else_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.gitkeep").touch()
    table(tmp_path / "t.csv", [("none.png", "x")])
    with pytest.raises(InputError, match="got none that is usable in .*t.csv"):
        packed(tmp_path / "t.csv", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".gitkeep"]


def slow(paths, *rest):
    Path(paths[0]).with_suffix(f".{os.getpid()}").touch()
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["process", "parent"])
def test_a_process_that_is_killed(tmp_path, rows, monkeypatch, victim):
    """A dead process is an error; the others end with their parent even if that is killed."""
    monkeypatch.setattr(pack, "_write_shard", slow)
    (tmp_path / "out").mkdir()
    child = os.fork()
    if not child:
        with pytest.raises(
            pack.PackError, match=r"a process died before .* the same command goes on where it was"
        ):
            pack.pack(rows, tmp_path / "out", workers=2, progress=False)
        os._exit(7)
    deadline = time.monotonic() + 30
    while len(workers := [int(path.suffix[1:]) for path in (tmp_path / "out").glob("t-*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child if victim == "parent" else workers[0], signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if victim == "parent" else 7)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_data_with_shards_in_place_of_tables_and_folders(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    tars = ["a.tar", Path("b.tar"), "http://host/rows.csv", "pipe:cat rows.csv"]
    columns = {"image_key": "where", "caption_key": "what", "images": "img"}
    source = [
        *tars,
        "rows.csv",
        {"shards": ["other.csv", "c.tar"], "weight": 2, **columns},
        "rows.tsv",
    ]
    found = pack.packed(source, tmp_path / "out")
    shard = {
        name: [str(tmp_path / f"out/{name}/{name.split('-')[0]}-000000.tar")]
        for name in ("other", "rows", "rows-2")
    }
    assert found == [
        *tars,
        shard["rows"],
        {"shards": [shard["other"], "c.tar"], "weight": 2},
        shard["rows-2"],
    ]
    assert capsys.readouterr().out.count("packed ") == 3
    before = digests(tmp_path / "out", "*/*.tar")
    assert pack.packed(source, tmp_path / "out") == found
    assert capsys.readouterr().out.count("kept 2 samples of ") == 3
    assert digests(tmp_path / "out", "*/*.tar") == before
    tables = [tmp_path / name for name in ("rows.csv", "more/rows.csv", "rows-2.csv")]
    for place in tables:
        place.parent.mkdir(exist_ok=True)
        table(place, [(folder / path, text) for path, text in ROWS])
    found = pack.packed(tables, tmp_path / "several")
    assert [Path(shard).parent.name for (shard,) in found] == ["rows", "rows-2", "rows-2-2"]
    assert pack.packed("texts", tmp_path / "one") == [str(tmp_path / "one/texts/texts-000000.tar")]


def test_packing_loads_neither_torch_nor_open_clip(tmp_path, rows):
    code = "import sys; from simplclip.commands.main import app; app(standalone_mode=False)"
    code += "; print({'torch', 'open_clip', 'PIL'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "data", "pack", rows, "--out", tmp_path / "out"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.stdout.endswith("{'PIL'}\n"), run.stderr
