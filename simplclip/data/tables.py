"""Tables of image path and caption: CSV, TSV and parquet, read in pieces of ROWS rows.

A CSV or TSV file is UTF-8, with or without a byte order mark. The process that divides the work holds only the places of the
pieces of such a file, and the two columns of a parquet file, but never a Python object for each row.
"""

from __future__ import annotations

import codecs
import csv
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.broken import Skipped
from simplclip.data.parts import ROWS, Part, checked, image_sample
from simplclip.data.shards import Sample, image_of

LINE = 1 << 24  # bytes of the longest line of a table
SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATORS = "\t,|;"
# Columns of tables, and keys of the objects of JSON files, in order of preference: the first of these names that a file has.
IMAGE_NAMES = ("filepath", "image_path", "path", "image", "file_name", "filename", "file", "image_name")
CAPTION_NAMES = ("captions", "caption", "sentences", "title", "text", "raw", "comment")
_ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8


@dataclass(frozen=True)
class Options:
    """Options of a table or JSON file. None: columns by IMAGE_NAMES and CAPTION_NAMES, the separator by the header.

    images: folder of the images, by default the file's own. split: name in a JSON file or in clip-benchmark's layout.
    """

    image_key: str | None = None
    caption_key: str | None = None
    separator: str | None = None
    images: str | None = None
    split: str | None = None

    def folder(self, path: str) -> str:
        return os.path.dirname(path) if self.images is None else os.path.expanduser(self.images)


def name_in(names: Iterable[str], wanted: str | None, known: tuple[str, ...]) -> str | None:
    """Returns the one of `names` to read: `wanted`, if given, or else the first of `known` there; None if there is none."""
    return next((name for name in ((wanted,) if wanted else known) if name in names), None)


@dataclass(frozen=True, kw_only=True)
class Rows(Part):
    """Rows of a table."""

    images: str  # folder of the images
    first: int  # number of the first row
    count: int

    def values(self, skipped: Skipped) -> Iterator[tuple[int, Any, list[Any]]]:
        """Yields the number of each row, its image's path and its captions. Broken rows are counted in `skipped`."""
        raise NotImplementedError

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        for number, image, captions in self.values(skipped):
            yield from image_sample(self.url, f"{number:09d}", self.images, image, captions, skipped)


@dataclass(frozen=True, kw_only=True)
class CsvRows(Rows):
    start: int  # byte offset in the file
    end: int
    separator: str
    places: tuple[int, int]  # indices of the columns of images and captions

    def values(self, skipped: Skipped) -> Iterator[tuple[int, Any, list[Any]]]:
        with open(self.url, "rb") as file:
            file.seek(self.start)
            for number, (row, _) in enumerate(_rows(file, self.separator, self.end), self.first):
                place = f"{os.path.basename(self.url)}/{number:09d}"
                if isinstance(row, str):
                    skipped.add("bad row", place, row)
                elif len(row) <= max(self.places):
                    skipped.add("bad row", place, f"expected {max(self.places) + 1} columns")
                elif _ESCAPED.search(caption := row[self.places[1]]):
                    skipped.add("caption not UTF-8", place)
                else:
                    yield number, row[self.places[0]].strip(), [caption]


@dataclass(frozen=True, kw_only=True)
class ParquetRows(Rows):
    table: Any  # pyarrow's Table with the two columns of the whole file, which all pieces share

    def values(self, skipped: Skipped) -> Iterator[tuple[int, Any, list[Any]]]:
        rows = self.table.slice(self.first, self.count)
        images, captions = (_values(rows.column(i)) for i in (0, 1))
        for number, (image, caption) in enumerate(zip(images, captions), self.first):
            several = caption if isinstance(caption, list) else [] if caption is None else [str(caption)]
            yield number, image, several


def table(path: str, options: Options, name: str) -> list[Part]:
    """Returns the pieces of a .csv, .tsv or .parquet file. Raises InputError, naming the argument `name`."""
    parts = (_parquet if path.lower().endswith(".parquet") else _csv)(path, options, name)
    if not parts:
        raise InputError(f"{name}: expected a table with rows, got {path!r}, which has none")
    return checked(parts, name)


def merged(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Merges samples of a table that have the same image: the first of them gets the captions of all."""
    found: dict[str, Sample] = {}
    for sample in samples:
        image: Any = image_of(sample)
        file = image.file
        if file in found:
            found[file]["__captions__"] += sample["__captions__"]
        else:
            found[file] = sample
    return iter(found.values())


def _places(titles: list[str], path: str, options: Options, name: str) -> tuple[int, int]:
    """Returns the indices of the columns of images and captions."""
    found = []
    for option, wanted, known in (
        ("image_key", options.image_key, IMAGE_NAMES),
        ("caption_key", options.caption_key, CAPTION_NAMES),
    ):
        column = name_in(titles, wanted, known)
        if column is None:
            names = wanted or " or ".join(known)
            got = f"{path!r} with the columns {', '.join(map(repr, titles))[:300]}"
            other = next((one for one in SEPARATORS for title in titles if one in title), None)
            hint = f"; its header has {other!r}: try separator={other!r}" if other else ""
            raise InputError(f"{name}: expected a table with a column {names} ({option}), got {got}{hint}")
        found.append(titles.index(column))
    return found[0], found[1]


def _csv(path: str, options: Options, name: str) -> list[Part]:
    parts: list[Part] = []
    with open(path, "rb") as file:
        separator, places = _header(file, path, options, name)
        first, count, start = 0, 0, file.tell()

        def add(end: int) -> None:
            how: dict[str, Any] = {"url": path, "images": options.folder(path), "separator": separator, "places": places}
            parts.append(CsvRows(first=first, count=count, start=start, end=end, **how))

        for _, end in _rows(file, separator, parse=False):
            count += 1
            if count == ROWS:
                add(end)
                first, count, start = first + count, 0, end
        if count:
            add(end)
    return parts


def _header(file: BinaryIO, path: str, options: Options, name: str) -> tuple[str, tuple[int, int]]:
    """Reads the separator, by default the most frequent one in the first line, and the indices of path and caption."""
    line = file.readline(LINE)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: expected a table in UTF-8, got {path!r} in UTF-16: iconv -f UTF-16 -t UTF-8")
    if b"\r" in line.rstrip(b"\r\n"):
        raise InputError(f"{name}: expected a table whose lines end in \\n or \\r\\n, got {path!r} with \\r alone")
    header = line.decode("utf-8-sig", "surrogateescape")
    separator = options.separator or ("\t" if path.lower().endswith(".tsv") else max(SEPARATORS, key=header.count))
    try:
        titles = next(csv.reader([header], delimiter=separator), [])
    except (csv.Error, TypeError) as error:  # e.g. a separator of several characters
        raise InputError(f"{name}: expected a table with a line of columns, got {path!r}: {error}") from None
    return separator, _places([title.strip() for title in titles], path, options, name)


def _rows(
    file: BinaryIO, separator: str, end: float = math.inf, parse: bool = True
) -> Iterator[tuple[list[str] | str | None, int]]:
    """Yields the rows up to the byte `end`, each with the offset after it. In place of a bad row it yields the reason.

    Empty lines are no rows. A quoted field may span several lines. A row with an unclosed quote, or a field above csv's
    limit, ends after its first line, so that no other row is lost. parse: if False, yields None for rows without quotes.
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
    """Reads the row that begins with `line`. Returns it, or why it is bad, and the offset after the last line read."""
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


def _parquet(path: str, options: Options, name: str) -> list[Part]:
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
        chosen = [titles[place] for place in _places(titles, path, options, name)]
        table = file.read(columns=chosen).select(chosen)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: expected a parquet file, got {path!r}: {error}") from None
    how = {"url": path, "images": options.folder(path), "table": table}
    starts = range(0, len(table), ROWS)
    return [ParquetRows(first=first, count=min(ROWS, len(table) - first), **how) for first in starts]


def _values(column: Any) -> list[Any]:
    """Returns the values of a column of parquet; None for a value that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_values(column.slice(place, 1))[0] for place in range(len(column))] if len(column) > 1 else [None]
