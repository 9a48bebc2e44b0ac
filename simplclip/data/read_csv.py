"""Tables of text: a line for each caption."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator
from typing import BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.rows import (
    LINE_BYTES,
    Options,
    PairRow,
    Reader,
    RowSource,
    columns_of,
    file_source,
    line_count,
    merged_by_image,
    table_row,
)

SEPARATORS = "\t,|;"


class CsvReader(Reader):
    """A table with a line of columns; the separator is told by that line."""

    endings = (".csv", ".tsv")
    about = "a table of image paths and captions"
    metadata = "metadata.csv"

    @classmethod
    def read(cls, path: str, options: Options) -> RowSource:
        """Returns the rows of a table; neighbouring lines of one image are one row."""
        with open(path, "rb") as file:
            header = file.readline(LINE_BYTES)
            if b"\0" in header:
                raise InputError(
                    f"source: expected a table in UTF-8, got {path!r}, perhaps in UTF-16: iconv -f "
                    "UTF-16 -t UTF-8"
                )
            total = line_count(file)
        text = header.decode("utf-8-sig", "surrogateescape")
        separator = "\t" if path.lower().endswith(".tsv") else max(SEPARATORS, key=text.count)
        try:
            titles = [title.strip() for title in next(csv.reader([text], delimiter=separator), [])]
        except csv.Error as error:  # e.g. lines that end in \r alone
            raise InputError(
                f"source: expected a table with a line of columns, got {path!r}: {error}"
            ) from None
        image, caption = map(titles.index, columns_of(titles, path, options))

        def rows() -> Iterator[PairRow]:
            """Yields a row for each record, with `problem` for a bad one."""
            with open(path, "rb") as file:
                file.readline(LINE_BYTES)
                for number, record in enumerate(_records(file, separator)):
                    name = f"{os.path.basename(path)}/{number:09d}"
                    if isinstance(record, str):
                        yield PairRow(name, problem=("bad row", record))
                    elif len(record) <= max(image, caption) or any(record[len(titles) :]):
                        detail = f"expected {len(titles)} columns, got {len(record)}"
                        yield PairRow(name, problem=("bad row", detail))
                    elif _not_utf8(record[caption]):
                        yield PairRow(name, problem=("caption not UTF-8", ""))
                    else:
                        yield table_row(
                            name, record[image].strip(), [record[caption]], path, options
                        )

        return file_source(path, options, max(1, total), lambda: merged_by_image(rows()))


def _not_utf8(text: str) -> bool:
    """Whether a text was decoded with surrogateescape from bytes that are not UTF-8."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _records(file: BinaryIO, separator: str) -> Iterator[list[str] | str]:
    """Yields the records of an open table; in place of a bad one the reason, a str.

    A quoted field may span several lines. A record with a quote that is not closed before a
    separator or the end of a line, or with a field above csv's limit, ends with its first line, so
    that no other record is lost.
    """
    while first := file.readline(LINE_BYTES):
        if not first.strip(b"\r\n"):
            continue
        second = file.tell()  # position of the second line
        read_all = False

        def lines(first: bytes = first) -> Iterator[str]:
            """Yields the decoded lines from `first` on; sets `read_all` at the file's end."""
            nonlocal read_all
            for line in itertools.chain([first], iter(lambda: file.readline(LINE_BYTES), b"")):
                yield line.decode(errors="surrogateescape")
            read_all = True

        try:
            # strict: a quote that is not closed would otherwise end at any quote below
            record: list[str] | str = next(csv.reader(lines(), delimiter=separator, strict=True))
        except csv.Error as error:
            reason = "expected a quote at its end, got none" if read_all else str(error)
            record = _fields_of_line(first, separator) or reason
            file.seek(second)
        yield record


def _fields_of_line(line: bytes, separator: str) -> list[str]:
    """Returns the fields of a line, as of `"a" b` after a quote; [] if it is no record."""
    text = line.decode(errors="surrogateescape")
    try:
        fields, *empty_line = csv.reader([text, ""], delimiter=separator)
    except csv.Error:
        return []
    return fields if empty_line else []
