"""Tables and JSON files as streams of rows, each an image with its captions.

    .csv, .tsv, .parquet, .jsonl    a row for each caption; neighbouring rows of one image are one
                                    sample, and others are a group
    .json                           in Karpathy's or COCO's format

`open_source` also opens folders (read_folders.py), and those of Hugging Face's imagefolder, whose
metadata.jsonl or metadata.csv names the images. Text is UTF-8, with or without byte order mark.
Nothing here imports torch, so that packing some images takes a second.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.read_folders import open_folder
from simplclip.data.read_json import json_lines, json_rows
from simplclip.data.read_parquet import parquet_rows
from simplclip.data.rows import (
    LINE_BYTES,
    Options,
    Row,
    RowSource,
    columns_of,
    file_source,
    is_address,
    line_count,
    merged_by_image,
    table_row,
)

TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
JSON = ".json"
METADATA = ("metadata.jsonl", "metadata.csv")  # of Hugging Face's imagefolder
SEPARATORS = "\t,|;"


def is_source(path: str | os.PathLike) -> bool:
    """Whether a path is a table, a JSON file or a folder, of which `pack_shards` makes shards.

    A file is told by its ending (also FILE.json#SPLIT) and need not exist; a folder must. False for
    a URL or pipe:COMMAND.
    """
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and is_address(text):
        return False
    return is_table(text) or os.path.isdir(text)


def is_table(path: Any) -> bool:
    """Whether `path` is the name of a table or JSON file, also FILE.json#SPLIT, and no folder's."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    file, _ = split_of(os.path.expanduser(os.fspath(path)))
    return file.lower().endswith((*TABLES, JSON)) and not os.path.isdir(file)


def open_source(path: str | os.PathLike, options: Options) -> RowSource:
    """Returns the rows of a table, a JSON file (also FILE.json#SPLIT) or a folder.

    A JSON file is parsed now; the rows of others are read when they are iterated. Raises InputError
    if it is none or damaged, lacks a column, or has no part that one of the options names.
    """
    file, split = split_of(os.path.expanduser(os.fspath(path)))
    if split:
        options = replace(options, split=split)
    if not os.path.exists(file):
        raise InputError(
            f"source: expected a table, a JSON file or a folder, got {file!r}, which does not exist"
        )
    name = file.lower()
    if os.path.isdir(file):
        metadata = _metadata_of(file)
        if metadata is not None:
            return replace(open_source(metadata, options), path=file)
        _check_options(file, options, ())
        return open_folder(file)
    if name.endswith(JSON):
        _check_options(file, options, ("images", "split"))
    else:
        _check_options(file, options, ("images", "image_key", "caption_key"))
    if not name.endswith((*TABLES, JSON)) or not os.path.isfile(file):
        endings = f"{', '.join(TABLES)} or {JSON}"
        expected = f"a folder of images, or a file that ends in {endings}"
        hint = "; training reads tars as they are" if ".tar" in name else ""
        raise InputError(f"source: expected {expected}, got {file!r}{hint}")
    if name.endswith(JSON):
        return json_rows(file, options)
    if name.endswith(".jsonl"):
        return json_lines(file, options)
    if name.endswith(".parquet"):
        return parquet_rows(file, options)
    return _table(file, options)


def _metadata_of(folder: str) -> str | None:
    """Returns the path of the table that names a folder's images, None if it has none.

    A file of one of the names METADATA without a column file_name is something else.
    """
    for name in METADATA:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if b"file_name" in file.readline(LINE_BYTES):
                    return path
    return None


def _check_options(file: str, options: Options, names: tuple[str, ...]) -> None:
    """Raises InputError for an option that a source does not have.

    names: of the options that `file` may have.
    """
    for name, value in options.given().items():
        if name not in names:
            raise InputError(f"{name}: expected none, as {file!r} has no such part, got {value!r}")


def split_of(path: str) -> tuple[str, str]:
    """Returns (FILE.json, SPLIT) of FILE.json#SPLIT, (path, "") of any other path.

    A file that exists under the whole name is no FILE.json#SPLIT.
    """
    file, sharp, split = path.rpartition("#")
    if sharp and file.lower().endswith(JSON) and not os.path.exists(path):
        return file, split
    return path, ""


def _table(path: str, options: Options) -> RowSource:
    """Returns the rows of a .csv or .tsv file.

    The file is read once to count its lines, and once each time that rows are read. Neighbouring
    lines of one image are one row. Raises InputError if the columns that `options` names, or the
    usual ones, are missing.
    """
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

    def rows() -> Iterator[Row]:
        """Yields a row for each record, with `problem` for a bad one."""
        with open(path, "rb") as file:
            file.readline(LINE_BYTES)
            for number, record in enumerate(_records(file, separator)):
                name = f"{os.path.basename(path)}/{number:09d}"
                if isinstance(record, str):
                    yield Row(name, problem=("bad row", record))
                elif len(record) <= max(image, caption) or any(record[len(titles) :]):
                    detail = f"expected {len(titles)} columns, got {len(record)}"
                    yield Row(name, problem=("bad row", detail))
                elif _not_utf8(record[caption]):
                    yield Row(name, problem=("caption not UTF-8", ""))
                else:
                    yield table_row(name, record[image].strip(), [record[caption]], path, options)

    return file_source(path, options, max(1, total), lambda: merged_by_image(rows()))


def _not_utf8(text: str) -> bool:
    """Whether a text was decoded with surrogateescape from bytes that are not UTF-8."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _records(file: BinaryIO, separator: str) -> Iterator[list[str] | str]:
    """Yields the records of a table as lists of fields; in place of a bad one the reason, a str.

    file: open at the line after the titles, in binary mode; its position moves. separator: of
    fields. Empty lines are no records. A quoted field may span several lines. A record with a quote
    that is not closed before a separator or the end of a line, or with a field above csv's limit,
    ends with its first line, so that no other record is lost.
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
    """Returns the fields of a line, in which text may follow a quote: `"a" b`.

    [] if it is no record of its own: a quote is not closed, or a field is above csv's limit.
    """
    text = line.decode(errors="surrogateescape")
    try:
        fields, *empty_line = csv.reader([text, ""], delimiter=separator)
    except csv.Error:
        return []
    return fields if empty_line else []
