"""Tables and JSON files as streams of rows, each an image with its captions.

    .csv, .tsv, .parquet    a row for each caption; neighbouring rows of one image are one sample,
                            and others are a group
    .json                   in Karpathy's or COCO's format

`open_source` also opens folders (read_folders.py). Text is UTF-8, with or without byte order mark.
Nothing here imports torch, so that packing some images takes a second.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from simplclip.common.errors import InputError
from simplclip.data.read_folders import open_folder
from simplclip.data.rows import Row, RowSource
from simplclip.data.samples import json_of, state_of

TABLES = (".csv", ".tsv", ".parquet")
JSON = ".json"
# Columns of tables, in order of preference: the first of these names that a table has.
IMAGE_NAMES: tuple[str, ...] = (
    "filepath",
    "image_path",
    "path",
    "image",
    "file_name",
    "filename",
    "file",
    "image_name",
)
CAPTION_NAMES: tuple[str, ...] = ("captions", "caption", "title", "text", "comment")
SEPARATORS = "\t,|;"
LINE_BYTES = 1 << 24  # most bytes of a line


@dataclass(frozen=True)
class Options:
    """Options of tables and JSON files.

    image_key, caption_key: columns of a table; by default the first of IMAGE_NAMES and of
    CAPTION_NAMES. images: folder of the images; by default the file's own. split: name of a split
    in a JSON file.
    """

    image_key: str | None = None
    caption_key: str | None = None
    images: str | None = None
    split: str | None = None

    def image(self, file: str, path: str) -> str:
        """Returns where an image is that the table or JSON file `file` names `path`.

        It is relative to `images`, else to the folder of `file`; a URL or pipe:COMMAND stays as it
        is.
        """
        if is_address(path):
            return path
        if self.images is None:
            return os.path.join(os.path.dirname(file), path)
        return os.path.join(os.path.expanduser(self.images), path)


def is_address(text: str) -> bool:
    """Whether a text has the form of a URL or pipe:COMMAND; nothing is looked up."""
    return text.startswith("pipe:") or "://" in text


def is_source(path: str | os.PathLike) -> bool:
    """Whether a path is a table, a JSON file or a folder, of which `pack_shards` makes shards.

    A file is told by its ending (also FILE.json#SPLIT) and need not exist; a folder must. False for
    a URL or pipe:COMMAND.
    """
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and is_address(text):
        return False
    file, _ = split_of(text)
    return file.lower().endswith((*TABLES, JSON)) or os.path.isdir(file)


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
    set_options = {key: value for key, value in vars(options).items() if value is not None}
    if os.path.isdir(file):
        _check_options(file, set_options, ())
        return open_folder(file)
    if name.endswith(JSON):
        _check_options(file, set_options, ("images", "split"))
    else:
        _check_options(file, set_options, ("images", "image_key", "caption_key"))
    if not name.endswith((*TABLES, JSON)) or not os.path.isfile(file):
        expected = "a folder of images, or a file that ends in .csv, .tsv, .parquet or .json"
        hint = "; training reads tars as they are" if ".tar" in name else ""
        raise InputError(f"source: expected {expected}, got {file!r}{hint}")
    if name.endswith(JSON):
        total, rows = _json(file, options)
    elif name.endswith(".parquet"):
        total, rows = _parquet(file, options)
    else:
        total, rows = _table(file, options)
    return RowSource(file, total, lambda: {**state_of(file), **set_options}, rows)


def _check_options(file: str, set_options: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises InputError for an option that a source does not have.

    set_options: those that are not None, by name. names: of those that `file` may have.
    """
    for name, value in set_options.items():
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


def _table(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    """Returns the number of lines of a .csv or .tsv file, and a function that yields its rows.

    The file is read once to count, and once by each call of the function. Neighbouring lines of one
    image are one row. Raises InputError if the columns that `options` names, or the usual ones, are
    missing.
    """
    with open(path, "rb") as file:
        header = file.readline(LINE_BYTES)
        if b"\0" in header:
            raise InputError(
                f"source: expected a table in UTF-8, got {path!r}, perhaps in UTF-16: iconv -f "
                "UTF-16 -t UTF-8"
            )
        total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    text = header.decode("utf-8-sig", "surrogateescape")
    separator = "\t" if path.lower().endswith(".tsv") else max(SEPARATORS, key=text.count)
    try:
        titles = [title.strip() for title in next(csv.reader([text], delimiter=separator), [])]
    except csv.Error as error:  # e.g. lines that end in \r alone
        raise InputError(
            f"source: expected a table with a line of columns, got {path!r}: {error}"
        ) from None
    image, caption = map(titles.index, _columns(titles, path, options))

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
                    yield _row(name, record[image].strip(), [record[caption]], path, options)

    return max(1, total), lambda: _merged_by_image(rows())


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


def _parquet(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    """Returns the number of rows of a parquet file, and a function that yields them as `Row`s.

    Only its schema is read now. Neighbouring rows of one image are joined. Raises InputError for
    another file or missing columns.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"source: expected a parquet file, got {path!r}: {error}") from None
    columns = _columns(file.schema_arrow.names, path, options)

    def pairs() -> Iterator[tuple[Any, ...]]:
        """Yields (image, captions) of each row as pyarrow scalars. Raises InputError for damage."""
        try:
            for batch in file.iter_batches(4096, columns=columns):
                yield from zip(*(batch.column(name) for name in columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"source: expected a parquet file, got {path!r}, which is damaged: {error}"
            ) from None

    def value(scalar: Any) -> Any:
        """Returns the Python value of a pyarrow scalar, None if it has none, as a far date.

        Raises UnicodeDecodeError.
        """
        try:
            return scalar.as_py()
        except UnicodeDecodeError:
            raise
        except (ValueError, OverflowError, pyarrow.ArrowException):
            return None

    def rows() -> Iterator[Row]:
        """Yields a `Row` for each row, with `problem` for one whose texts are not UTF-8."""
        for number, (image, captions) in enumerate(pairs()):
            name = f"{os.path.basename(path)}/{number:09d}"
            try:
                texts = _texts(value(captions))
            except UnicodeDecodeError:
                yield Row(name, problem=("caption not UTF-8", ""))
                continue
            try:
                image_path = _decoded(value(image))
            except UnicodeDecodeError:  # also of a column of the images' contents
                yield Row(name, problem=("missing image", "expected a path, got other bytes"))
                continue
            yield _row(name, image_path, texts, path, options)

    return file.metadata.num_rows, lambda: _merged_by_image(rows())


def _decoded(value: Any) -> Any:
    """Returns bytes, which are text in UTF-8, as a str; other values as they are.

    Raises UnicodeDecodeError.
    """
    return value.decode() if isinstance(value, bytes) else value


def _texts(captions: Any) -> list[str]:
    """Returns the captions of a parquet file's row, a list or one, as texts.

    Numbers become texts; other values, such as dates and structs, are no captions. Raises
    UnicodeDecodeError for bytes that are not UTF-8.
    """
    texts = []
    for value in captions if isinstance(captions, list) else [captions]:
        caption = _decoded(value)
        if isinstance(caption, (str, int, float, Decimal)) and not isinstance(caption, bool):
            texts.append(str(caption))
    return texts


def _row(name: str, image: Any, captions: list[Any], path: str, options: Options) -> Row:
    """Returns the row of an image that the table `path` names `image`.

    If that is no text or empty, the row has the problem "missing image". name: of the row in
    messages.
    """
    if not isinstance(image, str) or not image:
        return Row(name, problem=("missing image", ""))
    return Row(name, options.image(path, image), captions, group=image)


def _merged_by_image(rows: Iterator[Row]) -> Iterator[Row]:
    """Yields neighbouring rows of one image as one row with the captions of all.

    The first one gives its name; a row with a problem stays alone.
    """
    for _, group in itertools.groupby(rows, lambda row: row.name if row.problem else row.image):
        first, *more = group
        captions = [*first.captions]
        for row in more:
            captions += row.captions
        yield first._replace(captions=captions)


def _columns(titles: list[str], path: str, options: Options) -> list[str]:
    """Returns the names of the columns of images and of captions, in this order.

    titles: all columns of the table `path`. Raises InputError if one is missing.
    """
    columns = []
    usual_names = {"image_key": IMAGE_NAMES, "caption_key": CAPTION_NAMES}
    for option, names in usual_names.items():
        key = getattr(options, option)
        if key:
            names = (key,)
        column = next((name for name in names if name in titles), None)
        if column is None:
            got = f"{path!r} with the columns {', '.join(map(repr, titles))[:300]}"
            expected = f"a table with a column {' or '.join(names)} ({option})"
            raise InputError(f"source: expected {expected}, got {got}")
        columns.append(column)
    return columns


def _json(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    """Parses a JSON file; returns the number of its images, and a function that yields their rows.

    Several entries of one image are one row with all captions. Raises InputError for another format
    and if no image, or none of the split in `options`, is in it.
    """
    captions: dict[str, list[Any]] = {}
    try:
        for image, texts in _entries(json_of(Path(path).read_text("utf-8-sig")), path, options):
            captions.setdefault(image, []).extend(texts)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        got = f"{path!r}, another one: {type(error).__name__}: {error}"
        raise InputError(
            f"source: expected images with captions, as in Karpathy's or COCO's JSON, got {got}"
        ) from None
    if not captions:
        split = f" of the split {options.split!r}" if options.split else ""
        raise InputError(f"source: expected images with captions, got none{split} in {path!r}")
    name = os.path.basename(path)
    rows = [
        Row(f"{name}/{image}", options.image(path, image), texts)
        for image, texts in captions.items()
    ]
    return len(rows), lambda: iter(rows)


def _entries(content: Any, path: str, options: Options) -> Iterator[tuple[str, list[Any]]]:
    """Yields (image, captions) of a JSON file; an image, a path or file name, may come again.

    content: the parsed file. path: its name in errors. Raises InputError if `options` name none of
    several splits, and for any other content its own error, e.g. KeyError.
    """
    images = content["images"]
    if "annotations" in content:  # COCO's captions_val2017.json
        files = {image["id"]: image["file_name"] for image in images}
        for entry in content["annotations"]:
            number = entry["image_id"]
            yield str(files.get(number, f"image_id {number}")), [entry["caption"]]
        return
    splits = list(dict.fromkeys(image["split"] for image in images if "split" in image))
    if options.split is None and len(splits) > 1:
        several = ", ".join(map(str, splits))
        raise InputError(
            f"source: expected one of the splits {several}, as {path}#{splits[0]}, got none"
        )
    for image in images:
        if options.split is None or image.get("split", options.split) == options.split:
            captions = [text["raw"] for text in image.get("sentences", [])]
            yield os.path.join(image.get("filepath", ""), image["filename"]), captions
