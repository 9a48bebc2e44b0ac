"""Pairs in tables and in folders of images."""

import pytest
import torch
from pairs import keys, loader, png, resize, table, text_of

from simplclip import data
from simplclip.common.errors import InputError
from simplclip.data import folders, pairs, tables
from simplclip.data.broken import Skipped
from simplclip.data.parts import read_part

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def pictures(tmp_path):
    """Writes 30 images in two folders; returns rows of a table about them."""
    for number in range(30):
        (tmp_path / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/{number % 2}/p{number}.{'PNG' if number % 3 else 'img'}").write_bytes(png(number))
    files = [f"images/{number % 2}/p{number}.{'PNG' if number % 3 else 'img'}" for number in range(30)]
    return [[file, f"{number} a"] for number, file in enumerate(files)]


def captions(source, **options):
    reader = loader(source, **{"drop_last": False, "transform": resize} | options)
    return sorted(text_of(row) for batch in reader.epoch(0) for row in batch["text"]), reader


WRITTEN = sorted(f"{number} a" for number in range(30))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tables(tmp_path, pictures, monkeypatch, kind, workers):
    monkeypatch.setattr(tables, "ROWS", 7)
    source = str(tmp_path / "pairs.csv")
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        source, columns = str(tmp_path / "pairs.parquet"), list(zip(*pictures))
        columns = {"similarity": [0.5] * 30, "caption": columns[1], "image_path": columns[0]}
        parquet.write_table(pyarrow.table(columns), source, row_group_size=11)
    else:
        table(source, pictures)
    found, reader = captions(source, workers=workers)
    assert (found, reader.skipped) == (WRITTEN, {})
    assert len(data.parts_of(source)) == 5
    assert reader.batches_per_epoch == 8
    (batch,) = captions(source, batch_size=30)[1].epoch(0)
    for text, image, key in zip(batch["text"], batch["image"], batch["key"]):
        number = int(text_of(text).split()[0])
        assert int(key) == number
        assert torch.equal(image, resize(data.shards.decode_pil(png(number))))


def test_rows_of_every_kind(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2)
    file = pictures[1][0]
    quoted = ['a "nail"', "over\ntwo lines", "with, comma", 'unclosed " inside', "\ufeff zwölf"]
    path = table(tmp_path / "odd.csv", [[file, text] for text in quoted])
    with open(path, "ab") as lines:
        lines.write(b"\n\r\n")  # empty lines
        lines.write(f'{file},half a "quote\n'.encode())  # a quote inside a field that is not quoted
        lines.write(f"{tmp_path}/{file},absolute\r\n".encode())
        lines.write(b"alone\n" + file.encode() + b",\n,no path\nnone.png,gone\n" + file.encode() + b",\xff\xfe\n")
        lines.write(b"\x00\r\x00," + file.encode() + b"\n" + file.encode() + b",last")
    found, reader = captions(path)
    assert found == sorted(
        text.removeprefix("\ufeff").strip()[:12].strip() for text in [*quoted, 'half a "quote', "absolute", "last"]
    )
    counted = reader.skipped
    assert counted.pop("bad row") + counted.pop("cannot be read") == 3  # the kind of one row depends on the version of Python
    assert counted == {"empty caption": 1, "missing image": 1, "caption not UTF-8": 1}
    keys_of = [found["__key__"] for part in data.parts_of(path) for found in read_part(part, Skipped())]
    assert keys_of == sorted(set(keys_of))


def test_separators(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for separator in tables.SEPARATORS:
        path = table(tmp_path / "t.csv", [["a.png", "one"]], separator=separator)
        assert captions(path)[0] == ["one"]
    with pytest.raises(InputError, match=r"with the columns 'filepath;title'; its header has ';': try separator=';'$"):
        loader({"shards": path, "separator": ","})


@pytest.mark.parametrize("rows", [9, 1500])  # a field of fewer and of more characters than csv's limit
def test_a_quote_that_is_never_closed_costs_its_row(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tables, "ROWS", 50)
    (tmp_path / "a.png").write_bytes(png())
    path = table(tmp_path / "t.csv", [["a.png", f"{number} {'x' * 100}"] for number in range(rows)])
    text = (tmp_path / "t.csv").read_text().replace("a.png,7 x", 'a.png,"7 x')
    (tmp_path / "t.csv").write_text(text)
    skipped = Skipped()
    read = [found for part in data.parts_of(path) for found in read_part(part, skipped)]
    assert skipped.counts == {"bad row": 1}
    assert len(read) == rows - 1
    assert read[-1]["__captions__"][0].startswith(f"{rows - 1} x")
    assert len({found["__key__"] for found in read}) == len(read)
    assert pairs.count(data.parts_of(path)) == [part.count for part in data.parts_of(path)]


def test_what_is_held_of_a_large_table(tmp_path):
    """No memory is held for a row of a CSV file: rows are counted, and found by the offsets of pieces."""
    import tracemalloc

    path = table(
        tmp_path / "t.csv", [[f"images/{number:09d}.jpg", f"a photo of thing {number}"] for number in range(100_000)]
    )
    tracemalloc.start()
    parts = data.parts_of(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(pairs.count(parts)) == 100_000
    assert held < 300_000  # 3 bytes a row
    last = list(read_part(parts[-1], Skipped()))[-1]
    assert last["__key__"] == "000099999"
    assert last["__captions__"] == ["a photo of thing 99999"]


@pytest.mark.parametrize("workers", [0, 2])
def test_folders(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(folders, "ROWS", 4)
    folder = tmp_path / "mine"
    for number in range(9):
        place = folder / ("" if number < 3 else f"sub {number % 2}/deep")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"IMG.{number}.jpg").write_bytes(png(number, form="JPEG"))
        if number % 2:
            (place / f"IMG.{number}.txt").write_text(f"{number} a")
        else:
            (place / f"IMG.{number}.json").write_text(f'{{"caption": "{number} a", "group": {number}}}')
    (folder / "README.txt").write_text("about these")
    (folder / "none.png").write_bytes(png())
    found, reader = captions(str(folder), workers=workers)
    assert found == [f"{number} a" for number in range(9)]
    assert reader.skipped == {"missing caption": 1}
    assert reader.batches_per_epoch == 3
    assert [part.count for part in data.parts_of(folder)] == [4, 4, 2]
    order = keys(loader(folder, shuffle=False, drop_last=False).epoch(0))
    assert order == ["IMG.0", "IMG.1", "IMG.2", *(f"sub {n % 2}/deep/IMG.{n}" for n in (4, 6, 8, 3, 5, 7))]


def test_links_to_folders(tmp_path):
    """A class may be a link to a folder; a link to its own parent or to the disk's root costs nothing."""
    (tmp_path / "all/dog/deep").mkdir(parents=True)
    for name in ("all/dog/1.png", "all/dog/deep/2.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "some").mkdir()
    for name, target in (("dog", "../all/dog"), ("root", "/"), ("self", ".")):
        (tmp_path / "some" / name).symlink_to(target, target_is_directory=True)
    found = data.held_out(str(tmp_path / "some"))
    assert [sample["__key__"] for sample in found.samples(Skipped())] == ["dog/1.png"]
    assert found.classes.names == ["dog", "root", "self"]


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="shards: expected the package pyarrow to read '.*t.parquet', got none: pip install"):
        loader(str(tmp_path / "t.parquet"))
