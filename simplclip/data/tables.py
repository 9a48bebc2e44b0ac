"""Tables of image paths and captions: CSV, TSV and parquet, read as a stream.

A CSV or TSV file is UTF-8, with or without a byte order mark. Neighbouring rows of one image are one sample with the captions
of all.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

from simplclip.common.errors import InputError
from simplclip.data.forms import CAPTION_NAMES, IMAGE_NAMES, BadRow, Options, Row, Rows, Source, file_state, key_in

LINE = 1 << 24  # most characters of a line
ROWS = 4096  # rows of parquet in memory at a time
JOINED = 100  # most rows of one image that become one sample
SEPARATORS = "\t,|;"
_ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8


def table(path: str, options: Options) -> Source:
    """Returns the rows of a .csv or .tsv file. Raises InputError for a wrong header."""
    with _opened(path) as file:
        separator, columns = _header(file, path, options)
    with open(path, "rb") as binary:
        lines = sum(block.count(b"\n") for block in iter(lambda: binary.read(1 << 20), b""))

    def rows() -> Rows:
        with _opened(path) as file:
            file.readline(LINE)
            for number, record in enumerate(_records(file, separator)):
                yield _row(f"{os.path.basename(path)}/{number:09d}", record, columns, path, options)

    return Source(path, max(1, lines - 1), file_state(path, options), lambda: joined(rows()))


def parquet(path: str, options: Options) -> Source:
    """Returns the rows of a .parquet file, whose captions may also be lists. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"source: expected the package pyarrow to read {path!r}, got none: pip install 'simplclip[data]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"source: expected a parquet file, got {path!r}: {error}") from None
    titles = file.schema_arrow.names
    columns = [titles[place] for place in _columns(titles, path, options)]

    def rows() -> Rows:
        numbers = itertools.count()
        for batch in file.iter_batches(ROWS, columns=columns):
            for image, caption, number in zip(*(_values(batch.column(name)) for name in columns), numbers):
                name = f"{os.path.basename(path)}/{number:09d}"
                if isinstance(image, str) and image:
                    several = caption if isinstance(caption, list) else [] if caption is None else [str(caption)]
                    yield Row(name, options.image(path, image), several)
                else:
                    yield BadRow(name, "missing image")

    return Source(path, file.metadata.num_rows, file_state(path, options), lambda: joined(rows()))


def joined(rows: Rows) -> Rows:
    """Joins neighbouring rows of one image, as tables of several captions an image have them."""
    last: Row | BadRow | None = None
    for row in rows:
        if isinstance(last, Row) and isinstance(row, Row) and row.image == last.image and len(last.captions) < JOINED:
            last.captions.extend(row.captions)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _opened(path: str) -> TextIO:
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _header(file: TextIO, path: str, options: Options) -> tuple[str, tuple[int, int]]:
    """Reads the separator, of a CSV the most frequent one in the first line, and the places of path and caption."""
    header = file.readline(LINE)
    start = header[:2].encode("utf-8", "surrogateescape")
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise InputError(f"source: expected a table in UTF-8, got {path!r} in UTF-16: iconv -f UTF-16 -t UTF-8")
    separator = "\t" if path.lower().endswith(".tsv") else max(SEPARATORS, key=header.count)
    try:
        titles = next(csv.reader([header], delimiter=separator), [])
    except csv.Error as error:  # e.g. lines that end in \r alone
        raise InputError(f"source: expected a table with a line of columns, got {path!r}: {error}") from None
    return separator, _columns([title.strip() for title in titles], path, options)


def _columns(titles: list[str], path: str, options: Options) -> tuple[int, int]:
    """Returns the places of the columns of images and captions."""
    places = []
    for option, wanted, usual in (
        ("image_key", options.image_key, IMAGE_NAMES),
        ("caption_key", options.caption_key, CAPTION_NAMES),
    ):
        title = key_in(titles, wanted, usual)
        if title is None:
            names = wanted or " or ".join(usual)
            got = f"{path!r} with the columns {', '.join(map(repr, titles))[:300]}"
            raise InputError(f"source: expected a table with a column {names} ({option}), got {got}")
        places.append(titles.index(title))
    return places[0], places[1]


def _records(file: TextIO, separator: str) -> Iterator[list[str] | str]:
    """Yields the records of a table; in place of a bad one, the reason. Empty lines are no records.

    A quoted field may span several lines. A record with a quote that is not closed, or with a field above csv's limit, ends
    with its first line, so that no other record is lost.
    """
    again: deque[str] = deque()  # lines that were read in search of a closing quote

    def line() -> str:
        return again.popleft() if again else file.readline(LINE)

    while first := line():
        if first in ("\n", "\r\n"):
            continue
        further: list[str] = []

        def lines(first: str = first, further: list[str] = further) -> Iterator[str]:
            yield first
            while True:
                further.append(line())
                if not further[-1]:  # the end of the file
                    return
                yield further[-1]

        try:
            record: list[str] | str = next(csv.reader(lines(), delimiter=separator))
        except csv.Error as error:
            record = str(error)
        if further and not further[-1]:
            record = "expected a quote at its end, got none"
        if isinstance(record, str):
            again.extendleft(reversed([text for text in further if text]))
        yield record


def _row(name: str, record: list[str] | str, columns: tuple[int, int], path: str, options: Options) -> Row | BadRow:
    if isinstance(record, str):
        return BadRow(name, "bad row", record)
    if len(record) <= max(columns):
        return BadRow(name, "bad row", f"expected {max(columns) + 1} columns, got {len(record)}")
    image, caption = (record[place] for place in columns)
    if _ESCAPED.search(caption):
        return BadRow(name, "caption not UTF-8")
    if not image.strip():
        return BadRow(name, "missing image")
    return Row(name, options.image(path, image.strip()), [caption])


def _values(column: Any) -> list[Any]:
    """Returns the values of a column of parquet; None for a value that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_values(column.slice(place, 1))[0] for place in range(len(column))] if len(column) > 1 else [None]
