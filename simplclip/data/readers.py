"""What `data pack` takes, as streams of rows: the kinds of files in READERS, and folders.

A folder has images (read_folders.py), or also a table that names them, as Hugging Face's
imagefolder. Text is UTF-8, with or without byte order mark. Nothing here imports torch, so that
packing some images takes a second, nor numpy or Pillow before a folder is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from simplclip.common.errors import InputError
from simplclip.data.read_csv import CsvReader
from simplclip.data.read_json import JsonLinesReader, JsonReader
from simplclip.data.read_parquet import ParquetReader
from simplclip.data.rows import LINE_BYTES, Options, Reader, RowSource, is_address

# Of several tables in a folder the first reader's names its images.
READERS: tuple[type[Reader], ...] = (JsonLinesReader, CsvReader, ParquetReader, JsonReader)
ENDINGS = tuple(ending for reader in READERS for ending in reader.endings)
METADATA = tuple(reader.metadata for reader in READERS if reader.metadata)


def files_in_words() -> str:
    """Returns what the readers take, each with its endings, for the help."""
    return "; ".join(f"{reader.about} ({', '.join(reader.endings)})" for reader in READERS)


def is_source(path: str | os.PathLike) -> bool:
    """Whether a path is a file that a reader takes, or a folder: `pack_shards` makes shards of it.

    A file is told by its ending and need not exist; a folder must. False for a URL or pipe:COMMAND.
    """
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and is_address(text):
        return False
    return is_table(text) or os.path.isdir(text)


def is_table(path: object) -> bool:
    """Whether `path` is the name of a file that a reader takes, also FILE.json#SPLIT."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    file, _ = split_of(os.path.expanduser(os.fspath(path)))
    return _reader_of(file) is not None and not os.path.isdir(file)


def _reader_of(file: str) -> type[Reader] | None:
    """Returns the reader of files with this ending; None for another ending."""
    return next((reader for reader in READERS if file.lower().endswith(reader.endings)), None)


def open_source(path: str | os.PathLike, options: Options) -> RowSource:
    """Returns the rows of a table, a JSON file (also FILE.json#SPLIT) or a folder.

    Raises InputError if it is none or damaged, lacks a column, or has no part that an option names.
    """
    file, split = split_of(os.path.expanduser(os.fspath(path)))
    if split:
        options = replace(options, split=split)
    if not os.path.exists(file):
        raise InputError(
            f"source: expected a table, a JSON file or a folder, got {file!r}, which does not exist"
        )
    if os.path.isdir(file):
        return _open_folder(file, options)
    reader = _reader_of(file)
    if reader is None or not os.path.isfile(file):
        endings = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        expected = f"a folder of images, or a file that ends in {endings}"
        hint = "; training reads tars as they are" if ".tar" in file.lower() else ""
        raise InputError(f"source: expected {expected}, got {file!r}{hint}")
    _check_options(file, options, reader.options)
    return reader.read(file, options)


def _open_folder(folder: str, options: Options) -> RowSource:
    """Returns the rows of a folder; a table in it with a column file_name names its images."""
    from simplclip.data.read_folders import open_folder

    for name in METADATA:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if b"file_name" in file.readline(LINE_BYTES):
                    return replace(open_source(path, options), path=folder)
    _check_options(folder, options, ())
    return open_folder(folder)


def _check_options(file: str, options: Options, names: Iterable[str]) -> None:
    """Raises InputError for an option that is not one of `names`, which `file` may have."""
    for name, value in options.given().items():
        if name not in names:
            raise InputError(f"{name}: expected none, as {file!r} has no such part, got {value!r}")


def split_of(path: str) -> tuple[str, str]:
    """Returns (FILE.json, SPLIT) of FILE.json#SPLIT, (path, "") of any other, or existing, path."""
    file, sharp, split = path.rpartition("#")
    reader = _reader_of(file)
    if sharp and reader is not None and "split" in reader.options and not os.path.exists(path):
        return file, split
    return path, ""
