"""Pairs that do not lie in tars: tables of image path and caption, and folders of images with their captions beside them.

Both are read in pieces of ROWS samples, which workers divide. The loader's process holds of a CSV or TSV file the places of
its pieces, of a parquet file the two columns, of a folder the names of the files; not one Python object for each sample.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.broken import Skipped
from simplclip.data.shards import IMAGE_SUFFIXES, KNOWN, Sample
from simplclip.data.tar import Span

ROWS = 512
SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("filepath", "image_path", "path", "image", "file_name")
CAPTION_COLUMNS = ("title", "caption", "text")


@dataclass(frozen=True)
class Columns:
    """How a table is read; None: found by the names and the header."""

    image: str | None = None
    caption: str | None = None
    separator: str | None = None

    def of(self, header: list[str], path: str, name: str) -> tuple[int, int]:
        """The places of the image's path and of the caption."""
        found = []
        for option, wanted, known in (
            ("image_key", self.image, IMAGE_COLUMNS),
            ("caption_key", self.caption, CAPTION_COLUMNS),
        ):
            names = (wanted,) if wanted else known
            column = next((column for column in names if column in header), None)
            if column is None:
                got = f"{path!r} with the columns {', '.join(map(repr, header))}"
                raise InputError(f"{name}: expected a table with a column {' or '.join(names)} ({option}), got {got}")
            found.append(header.index(column))
        return found[0], found[1]


class Piece:
    """Some samples, read in order; `count` of them, without those that are broken."""

    count: int

    def read(self, source: str, skipped: Skipped) -> Iterator[Sample]:
        raise NotImplementedError


@dataclass(frozen=True)
class CsvPiece(Piece):
    first: int  # number of its first row
    count: int
    start: int  # bytes of the file
    end: int
    separator: str
    columns: tuple[int, int]

    def read(self, source: str, skipped: Skipped) -> Iterator[Sample]:
        with open(source, "rb") as file:
            file.seek(self.start)
            text = file.read(self.end - self.start).decode("utf-8", "surrogateescape")
        rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=self.separator)
        image, caption = self.columns
        number = self.first
        while True:
            try:
                row = next(rows)
                if not row:  # an empty line
                    continue
                yield from _row(source, number, row[image], row[caption], skipped)
            except StopIteration:
                return
            except (csv.Error, IndexError) as error:
                reason = f"expected {max(self.columns) + 1} columns" if isinstance(error, IndexError) else str(error)
                skipped.add("bad row", f"{os.path.basename(source)}/{number:09d}", reason)
            number += 1


@dataclass(frozen=True)
class ParquetPiece(Piece):
    first: int
    count: int
    table: Any  # pyarrow's, of the two columns of the whole file; all pieces share it

    def read(self, source: str, skipped: Skipped) -> Iterator[Sample]:
        rows = self.table.slice(self.first, self.count)
        images, captions = (rows.column(i).to_pylist() for i in (0, 1))
        for number, (image, caption) in enumerate(zip(images, captions), self.first):
            yield from _row(source, number, image, caption, skipped)


@dataclass(frozen=True)
class FolderPiece(Piece):
    count: int
    names: bytes  # of all files, of one sample after the other, each ended by a zero

    def read(self, source: str, skipped: Skipped) -> Iterator[Sample]:
        sample: Sample = {}
        for name in self.names[:-1].split(b"\0"):
            path = os.fsdecode(name)
            key, suffix = _split(path)
            if sample.get("__key__") != key:
                if sample:
                    yield sample
                sample = {"__key__": key, "__url__": source}
            sample[suffix] = _span(os.path.join(source, path))
        yield sample


TABLES = (CsvPiece, ParquetPiece)


def table(path: str, columns: Columns, name: str) -> list[Piece]:
    """The pieces of a .csv, .tsv or .parquet file. Raises InputError, naming the argument `name`."""
    pieces = _parquet(path, columns, name) if path.lower().endswith(".parquet") else _csv(path, columns, name)
    if not pieces:
        raise InputError(f"{name}: expected a table with rows, got {path!r}, which has none")
    next(pieces[0].read(path, skipped := Skipped()), None)
    if "not a local file" in skipped.counts:  # in later rows it is counted
        raise InputError(f"{name}: expected a table of images' paths, got {skipped.examples['not a local file']}")
    return pieces


def folder(path: str, name: str) -> list[Piece]:
    """The pieces of a folder of images: KEY.jpg with KEY.txt or KEY.json, also in its folders, in the order of names."""
    pieces: list[Piece] = []
    names: list[bytes] = []
    count = 0
    for place, folders, files in os.walk(path):
        folders.sort()
        inside = "" if place == path else os.path.relpath(place, path) + os.sep
        samples: dict[str, list[str]] = {}
        for file in files:
            if key := _split(file):
                samples.setdefault(key[0], []).append(file)
        for _, several in sorted(samples.items()):
            if any(_split(file)[1] in IMAGE_SUFFIXES for file in several):
                names += [os.fsencode(inside + file) + b"\0" for file in sorted(several)]
                count += 1
            if count == ROWS:
                pieces.append(FolderPiece(count, b"".join(names)))
                names, count = [], 0
    if count:
        pieces.append(FolderPiece(count, b"".join(names)))
    if not pieces:
        hint = " (try its *.tar)" if any(file.endswith(".tar") for file in os.listdir(path)) else ""
        raise InputError(
            f"{name}: expected a folder of images with KEY.txt beside them, got {path!r}, which has no image{hint}"
        )
    return pieces


def _csv(path: str, columns: Columns, name: str) -> list[Piece]:
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8-sig", "surrogateescape")
        separator = columns.separator or ("\t" if "\t" in header or path.lower().endswith(".tsv") else ",")
        titles = next(csv.reader([header], delimiter=separator), [])
        places = columns.of(titles, path, name)
        pieces: list[Piece] = []
        first, count, start = 0, 0, file.tell()
        for end in _ends(file, start, separator):
            count += 1
            if count == ROWS:
                pieces.append(CsvPiece(first, count, start, end, separator, places))
                first, count, start = first + count, 0, end
        if count:
            pieces.append(CsvPiece(first, count, start, end, separator, places))
    return pieces


def _ends(file: BinaryIO, place: int, separator: str) -> Iterator[int]:
    """The byte after each row; one with quotes may go over several lines."""

    def row(line: bytes) -> Iterator[str]:
        nonlocal place
        yield line.decode("utf-8", "surrogateescape")
        for line in file:
            place += len(line)
            yield line.decode("utf-8", "surrogateescape")

    for line in file:
        place += len(line)
        if b'"' in line:
            with contextlib.suppress(csv.Error):  # it is counted where the row is read
                next(csv.reader(row(line), delimiter=separator))
        if line not in (b"\n", b"\r\n"):
            yield place


def _parquet(path: str, columns: Columns, name: str) -> list[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name}: expected the package pyarrow to read {path!r}, got none: pip install 'simplclip[embed]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        titles = file.schema_arrow.names
        chosen = [titles[place] for place in columns.of(titles, path, name)]
        table = file.read(columns=chosen).select(chosen)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: expected a parquet file, got {path!r}: {error}") from None
    return [ParquetPiece(first, min(ROWS, len(table) - first), table) for first in range(0, len(table), ROWS)]


def _row(table: str, number: int, image: Any, caption: Any, skipped: Skipped) -> Iterator[Sample]:
    place = f"{number:09d}"
    if not isinstance(image, str) or not image:
        skipped.add("missing image", f"{os.path.basename(table)}/{place}")
    elif image.startswith("pipe:") or "://" in image:
        told = f"{image!r}, which is not a path: a table names local files alone; of URLs img2dataset makes shards"
        skipped.add("not a local file", f"{os.path.basename(table)}/{place}", told)
    else:
        _, suffix = _split(image) or ("", "")
        sample = {"__key__": place, "__url__": table}
        # The image's format is found by its content; the suffix only says that it is one.
        sample[suffix if suffix in IMAGE_SUFFIXES else "jpg"] = _span(os.path.join(os.path.dirname(table), image))
        yield sample | ({"txt": str(caption).encode("utf-8", "surrogateescape")} if caption is not None else {})


def _span(path: str) -> Span:
    try:
        return Span(path, 0, os.stat(path).st_size)
    except OSError:
        return Span(path, 0, 0)  # reading it raises the error, which is counted


def _split(name: str) -> tuple[str, str] | None:
    """Key and suffix of a file of a sample; None for other files. The key may have dots."""
    low = name.lower()
    return next(((name[: -len(suffix)], suffix[1:]) for suffix in KNOWN if low.endswith(suffix)), None)
