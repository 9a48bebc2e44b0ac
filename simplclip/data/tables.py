"""Pairs that do not lie in tars: tables of image path and caption, and folders of images with their captions beside them.

Both are read in pieces of ROWS samples, which workers divide. Evaluation reads CSV files by the same rows. The loader's
process holds of a CSV or TSV file the places of its pieces, of a parquet file the two columns, of a folder the names of
the files; not one Python object for each sample.
"""

from __future__ import annotations

import codecs
import csv
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.broken import Skipped
from simplclip.data.shards import IMAGE_SUFFIXES, KNOWN, Sample
from simplclip.data.tar import Span

ROWS = 512
LINE = 1 << 24  # bytes of the longest line of a table
SUFFIXES = (".csv", ".tsv", ".parquet")
IMAGES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
IMAGE_COLUMNS = ("filepath", "image_path", "path", "image", "file_name", "filename", "file", "image_name")
CAPTION_COLUMNS = ("title", "caption", "text", "captions", "sentences", "raw", "comment")


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
                got = f"{path!r} with the columns {', '.join(map(repr, header))[:300]}"
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
        for number, image, caption in self.rows(source, skipped):
            yield from _row(source, number, image, caption, skipped)

    def rows(self, source: str, skipped: Skipped) -> Iterator[tuple[int, str, str]]:
        """The number of each row, its image's path and its caption; the others are counted."""
        with open(source, "rb") as file:
            file.seek(self.start)
            for number, (row, _) in enumerate(_rows(file, self.separator, self.end), self.first):
                place = f"{os.path.basename(source)}/{number:09d}"
                if isinstance(row, str):
                    skipped.add("bad row", place, row)
                elif len(row) <= max(self.columns):
                    skipped.add("bad row", place, f"expected {max(self.columns) + 1} columns")
                elif _ESCAPED.search(caption := row[self.columns[1]]):
                    skipped.add("caption not UTF-8", place)
                else:
                    yield number, row[self.columns[0]].strip(), caption


@dataclass(frozen=True)
class ParquetPiece(Piece):
    first: int
    count: int
    table: Any  # pyarrow's, of the two columns of the whole file; all pieces share it

    def read(self, source: str, skipped: Skipped) -> Iterator[Sample]:
        rows = self.table.slice(self.first, self.count)
        images, captions = (_values(rows.column(i)) for i in (0, 1))
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
            if span := _span(os.path.join(source, path)):
                sample[suffix] = span
        yield sample


_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8
TABLES = (CsvPiece, ParquetPiece)


def table(path: str, columns: Columns, name: str) -> list[Piece]:
    """The pieces of a .csv, .tsv or .parquet file. Raises InputError, naming the argument `name`."""
    pieces = _parquet(path, columns, name) if path.lower().endswith(".parquet") else csv_pieces(path, columns, name)
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


def images(paths: list[str]) -> list[Piece]:
    """The pieces of image files, without captions."""
    names = [os.fsencode(os.path.abspath(path)) + b"\0" for path in paths]
    return [FolderPiece(len(some), b"".join(some)) for some in (names[i : i + ROWS] for i in range(0, len(names), ROWS))]


def csv_pieces(path: str, columns: Columns, name: str) -> list[Piece]:
    """The pieces of a CSV or TSV file in UTF-8, all of `CsvPiece`."""
    with open(path, "rb") as file:
        separator, places = _header(file, path, columns, name)
        pieces: list[Piece] = []
        first, count, start = 0, 0, file.tell()
        for _, end in _rows(file, separator, parse=False):
            count += 1
            if count == ROWS:
                pieces.append(CsvPiece(first, count, start, end, separator, places))
                first, count, start = first + count, 0, end
        if count:
            pieces.append(CsvPiece(first, count, start, end, separator, places))
    return pieces


def _header(file: BinaryIO, path: str, columns: Columns, name: str) -> tuple[str, tuple[int, int]]:
    """The separator, by default the one that the first line has most often, and the places of path and caption."""
    line = file.readline(LINE)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: expected a table in UTF-8, got {path!r} in UTF-16: iconv -f UTF-16 -t UTF-8")
    if b"\r" in line.rstrip(b"\r\n"):
        raise InputError(f"{name}: expected a table whose lines end in \\n or \\r\\n, got {path!r} with \\r alone")
    header = line.decode("utf-8-sig", "surrogateescape")
    separator = columns.separator or ("\t" if path.lower().endswith(".tsv") else max("\t,|", key=header.count))
    try:
        titles = next(csv.reader([header], delimiter=separator), [])
    except (csv.Error, TypeError) as error:  # a separator of several characters
        raise InputError(f"{name}: expected a table with a line of columns, got {path!r}: {error}") from None
    return separator, columns.of([title.strip() for title in titles], path, name)


def _rows(
    file: BinaryIO, separator: str, end: float = math.inf, parse: bool = True
) -> Iterator[tuple[list[str] | str | None, int]]:
    """The rows up to the byte `end`, each with the byte after it; in the place of a bad one, why. Empty lines are no rows.

    A quoted field may go over several lines. A row with a quote that is not closed, or a field above csv's limit, is its
    first line alone, so that it costs no other. parse: False gives None for rows of one line.
    """
    place = file.tell()
    while place < end and (line := file.readline(LINE)):
        place += len(line)
        if line in (b"\n", b"\r\n"):
            continue
        if parse or b'"' in line:
            row, after = _row_of(line, file, place, separator, end)
            if after != place and isinstance(row, str):
                file.seek(place)
            else:
                place = after
            yield row, place
        else:
            yield None, place


def _row_of(line: bytes, file: BinaryIO, place: int, separator: str, end: float) -> tuple[list[str] | str, int]:
    """The row that begins with a line, or why it is bad, and the byte after the last line that was read."""
    closed = True

    def lines() -> Iterator[str]:
        nonlocal closed, place
        yield line.decode("utf-8", "surrogateescape")
        while place < end and (further := file.readline(LINE)):
            place += len(further)
            yield further.decode("utf-8", "surrogateescape")
        closed = False

    try:
        row = next(csv.reader(lines(), delimiter=separator))
    except csv.Error as error:
        return str(error), place
    return row if closed else "expected a quote at its end, got none", place


def _parquet(path: str, columns: Columns, name: str) -> list[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name}: expected the package pyarrow to read {path!r}, got none: pip install 'simplclip[parquet]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        titles = file.schema_arrow.names
        chosen = [titles[place] for place in columns.of(titles, path, name)]
        table = file.read(columns=chosen).select(chosen)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: expected a parquet file, got {path!r}: {error}") from None
    return [ParquetPiece(first, min(ROWS, len(table) - first), table) for first in range(0, len(table), ROWS)]


def _values(column: Any) -> list[Any]:
    """The values of a column of parquet; None for what is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_values(column.slice(place, 1))[0] for place in range(len(column))] if len(column) > 1 else [None]


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
        suffix = suffix if suffix in IMAGE_SUFFIXES else "jpg"
        sample[suffix] = _span(os.path.join(os.path.dirname(table), image))
        if sample[suffix] is None:
            skipped.add("missing image", f"{os.path.basename(table)}/{place}", f"{image!r} is no file")
            return
        yield sample | ({"txt": str(caption).encode("utf-8", "surrogateescape")} if caption is not None else {})


def _span(path: str) -> Span | None:
    """The place of a file; None for what is no file, such as a named pipe, which would wait for its writer."""
    try:
        found = os.stat(path)
        return Span(path, 0, found.st_size) if stat.S_ISREG(found.st_mode) else None
    except OSError:
        return Span(path, 0, 0)  # reading it raises the error, which is counted
    except ValueError:  # a name with NUL
        return None


def _split(name: str) -> tuple[str, str] | None:
    """Key and suffix of a file of a sample; None for other files. The key may have dots."""
    low = name.lower()
    return next(((name[: -len(suffix)], suffix[1:]) for suffix in KNOWN if low.endswith(suffix)), None)
