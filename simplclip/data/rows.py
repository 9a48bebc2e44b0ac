"""What `simplclip data pack` takes, as rows of an image with its captions: tables, JSON files and
folders. Text is UTF-8, with or without byte order mark.

Neighbouring rows of a table that have one image are one row.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from simplclip.common.errors import InputError
from simplclip.data.errors import Skipped
from simplclip.data.images import CONVERT, IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from simplclip.data.samples import clean, json_of

# Columns of tables, in order of preference: the first of these names that a table has.
# fmt: off
IMAGE_NAMES = (
    "filepath", "image_path", "path", "image", "file_name", "filename", "file", "image_name",
)
# fmt: on
CAPTION_NAMES = ("captions", "caption", "title", "text", "comment")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # endings
ENDINGS = (*TABLES, ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # tables of a folder's images
SEPARATORS = "\t,|;"


class PairRow(NamedTuple):
    """An image with its captions, not read yet."""

    name: str  # in messages, and "source" in the sample's json
    image: str = ""  # path of the image
    captions: Sequence[object] = ()
    texts: Mapping[str, str] = {}  # suffix (txt, json) -> path of a file beside the image
    label: str | None = None
    # of a row without image or captions: the reason that is counted, and a detail
    problem: tuple[str, str] | None = None
    # of a table, the image as it is written there: rows of one image may be no neighbours
    group: str | None = None


@dataclass(frozen=True)
class RowSource:
    """A source of rows."""

    path: str
    total: int  # number of rows
    rows: Callable[[Skipped], Iterator[PairRow]]  # reads them; counts lines of a table that are bad
    classes: tuple[str, ...] = ()  # of a folder with a folder for each class: their names, in order

    @property
    def name(self) -> str:
        """The last part of the path, which names the source in messages."""
        return os.path.basename(os.path.abspath(self.path))


@dataclass(frozen=True)
class Options:
    """Options of tables and JSON files."""

    image_key: str | None = None  # columns of a table, by default the first of IMAGE_NAMES
    caption_key: str | None = None  # and of CAPTION_NAMES
    images: str | None = None  # folder of the images, by default the file's own

    def image(self, file: str, path: str) -> str:
        """Returns where an image is that the file `file` names `path`; an address stays."""
        if is_address(path):
            return path
        return os.path.join(os.path.expanduser(self.images or os.path.dirname(file)), path)

    def given(self) -> dict[str, str]:
        """Returns the options that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


NO_OPTIONS = Options()
OPTION_NAMES = tuple(Options.__dataclass_fields__)


def is_address(text: str) -> bool:
    """Whether a text has the form of a URL or pipe:COMMAND; nothing is looked up."""
    return text.startswith("pipe:") or "://" in text


def is_source(path: str | os.PathLike) -> bool:
    """Whether a path is a table or JSON file, or a folder: `pack` makes shards of it.

    A file is told by its ending and need not exist; a folder must. False for a URL or pipe:COMMAND.
    """
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and is_address(text):
        return False
    return is_table(text) or os.path.isdir(text)


def is_table(path: object) -> bool:
    """Whether `path` is the name of a table or JSON file, also FILE.json#SPLIT."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    file, _ = split_of(os.path.expanduser(os.fspath(path)))
    return file.lower().endswith(ENDINGS) and not os.path.isdir(file)


def split_of(path: str) -> tuple[str, str]:
    """Returns (FILE.json, SPLIT) of FILE.json#SPLIT, (path, "") of any other, or existing, path."""
    file, sharp, split = path.rpartition("#")
    if sharp and file.lower().endswith(".json") and not os.path.exists(path):
        return file, split
    return path, ""


def open_source(path: str | os.PathLike, options: Options = NO_OPTIONS) -> RowSource:
    """Returns the rows of a table, a JSON file (also FILE.json#SPLIT) or a folder.

    Raises InputError if it is none or damaged, lacks a column, or has no part that an option names.
    """
    file, split = split_of(os.path.expanduser(os.fspath(path)))
    expected = f"a folder of images, or a file that ends in {', '.join(ENDINGS)}"
    if not os.path.exists(file):
        raise InputError(f"source: expected {expected}, got {file!r}, which does not exist")
    if os.path.isdir(file):
        for name in METADATA:
            table = os.path.join(file, name)
            if os.path.isfile(table) and "file_name" in _opened(table).schema.names:
                return replace(_table(table, options), path=file)
    elif file.lower().endswith(TABLES):
        return _table(file, options)
    for name, value in options.given().items():
        if os.path.isdir(file) or name != "images":
            raise InputError(f"{name}: expected none, as {file!r} has no such part, got {value!r}")
    if os.path.isdir(file):
        return _folder(file)
    if file.lower().endswith(".json"):
        return _json(file, split, options)
    hint = "; training reads tars as they are" if ".tar" in file.lower() else ""
    raise InputError(f"source: expected {expected}, got {file!r}{hint}")


def _opened(path: str, columns: Sequence[str] = (), bad: Skipped | None = None) -> Any:
    """Returns pyarrow's dataset of a table. columns: of a csv, read as bytes. bad: counts bad rows.

    Raises InputError for a file that is no such table.
    """
    import pyarrow
    from pyarrow import csv, dataset

    def count(row: csv.InvalidRow) -> str:
        if bad is not None:
            got = f"expected {row.expected_columns} columns, got {row.actual_columns}"
            bad.add("bad row", os.path.basename(path), f"{got}: {row.text}")
        return "skip"

    kind: Any = {".jsonl": "json", ".parquet": "parquet"}.get(os.path.splitext(path)[1].lower())
    if kind is None:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline(1 << 20)
        separator = "\t" if path.lower().endswith(".tsv") else max(SEPARATORS, key=header.count)
        types = dict.fromkeys(columns, pyarrow.binary())
        kind = dataset.CsvFileFormat(
            csv.ParseOptions(
                delimiter=separator, newlines_in_values=True, invalid_row_handler=count
            ),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    with _named(path):
        return dataset.dataset(path, format=kind)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Context in which pyarrow's errors become InputErrors that name the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"source: expected a table, got {path!r}: {reason}") from None


def _table(path: str, options: Options) -> RowSource:
    """Returns the rows of a csv, tsv, jsonl or parquet file.

    A row's image is a path, its captions are a text, a number, or a list of these.
    """
    with _named(path):
        titles = _opened(path).schema.names
    image = _column(titles, "image_key", options.image_key, IMAGE_NAMES, path)
    caption = _column(titles, "caption_key", options.caption_key, CAPTION_NAMES, path)
    with _named(path):
        total = _opened(path, [image, caption]).count_rows()
    return RowSource(path, total, partial(_table_rows, path, [image, caption], options))


def _column(
    titles: Sequence[str], option: str, key: str | None, names: Sequence[str], path: str
) -> str:
    """Returns the title that a table has of `key`, or of the first of `names` without one."""
    names = names if key is None else (key,)
    # white space around a title is no part of its name
    by_name = {title.strip(): title for title in reversed(titles)}
    column = next((by_name[name] for name in names if name in by_name), None)
    if column is None:
        got = f"{path!r} with the columns {', '.join(map(repr, titles))[:300]}"
        expected = f"a table with a column {' or '.join(names)} ({option})"
        raise InputError(f"source: expected {expected}, got {got}")
    return column


def _table_rows(path: str, columns: list[str], options: Options, bad: Skipped) -> Iterator[PairRow]:
    """Yields the rows of a table, by its columns of images and captions."""
    found = Skipped()

    def rows() -> Iterator[PairRow]:
        table = _opened(path, columns, found)
        found.take()  # of the lines that told the schema
        batches = table.to_batches(
            columns=columns,
            batch_size=4096,
            batch_readahead=1,
            fragment_readahead=1,
            use_threads=False,
        )
        pairs = itertools.chain.from_iterable(
            zip(*(column.to_pylist() for column in batch.columns)) for batch in batches
        )
        for number, (image, captions) in enumerate(pairs):
            name = f"{os.path.basename(path)}/{number:09d}"
            yield _table_row(name, image, captions, path, options)

    with _named(path):
        for _, same in itertools.groupby(rows(), lambda row: row.image or row.name):
            first, *others = same
            captions = itertools.chain(first.captions, *(row.captions for row in others))
            yield first._replace(captions=list(captions))
    bad.merge(found)


def _table_row(name: str, image: Any, captions: Any, path: str, options: Options) -> PairRow:
    """Returns the row of a table's values; its problem says if a text is not UTF-8."""
    try:
        texts = [_text(value) for value in (captions if isinstance(captions, list) else [captions])]
    except UnicodeDecodeError:
        return PairRow(name, problem=("caption not UTF-8", ""))
    with contextlib.suppress(UnicodeDecodeError):
        image = _text(image)
    if isinstance(image, str) and image.strip():
        image = image.strip()
        return PairRow(name, options.image(path, image), texts, group=image)
    detail = f"expected a path, got {str(image)[:80]}" if image else ""
    return PairRow(name, problem=("missing image", detail))


def _text(value: object) -> object:
    """Returns bytes and numbers as text, anything else as it is."""
    if isinstance(value, bytes):
        return value.decode()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


def _json(path: str, split: str, options: Options) -> RowSource:
    """Returns a row for each image of a JSON file in Karpathy's or COCO's format."""
    captions: dict[str, list[object]] = defaultdict(list)
    try:
        content = json_of(Path(path).read_text("utf-8-sig"))
        for image, texts in _entries(content, split):
            captions[image] += texts
    except InputError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else error
        expected = "images with captions, as in Karpathy's or COCO's JSON"
        raise InputError(f"source: expected {expected}, got {path!r}: {reason}") from None
    name = os.path.basename(path)
    rows = [
        PairRow(f"{name}/{image}", options.image(path, image), texts)
        for image, texts in captions.items()
    ]
    return RowSource(path, len(rows), partial(_listed, rows))


def _listed(rows: Iterable[PairRow], bad: Skipped) -> Iterator[PairRow]:
    """Returns an iterator of rows of which none is bad."""
    return iter(rows)


def _entries(content: dict[str, Any], split: str) -> Iterator[tuple[str, list[object]]]:
    """Yields (path or file name of an image, captions); an image may come again."""
    images = content["images"]
    if "annotations" in content:  # COCO's captions_val2017.json
        files = {image["id"]: image["file_name"] for image in images}
        for entry in content["annotations"]:
            number = entry["image_id"]
            yield str(files.get(number, f"image_id {number}")), [entry["caption"]]
        return
    splits = [*dict.fromkeys(image["split"] for image in images if "split" in image)]
    if split not in splits and (split or len(splits) > 1):
        expected = f"one of the splits {', '.join(map(str, splits))}, as FILE.json#SPLIT"
        raise InputError(f"source: expected {expected}, got {split or 'none'}")
    for image in images:
        if not split or image.get("split") == split:
            captions = [text["raw"] for text in image.get("sentences", [])]
            yield os.path.join(image.get("filepath", ""), image["filename"]), captions


def _folder(path: str) -> RowSource:
    """Returns the rows of a folder: its images and those of its subfolders, in order of names.

    A row has the texts (.txt, .json) beside its image. If no image has one, the folders in `path`
    are classes: the label of an image, and its caption. An image of a format that is not read is a
    row with `problem`, unless it was converted beside.
    """
    path = path.rstrip(os.sep) or path
    rows = [*_images(path)]
    if not rows:
        hint = " (try its *.tar)" if [*Path(path).glob("*.tar")] else ""
        expected = "a folder of images with captions"
        raise InputError(f"source: expected {expected}, got {path!r}, which has no image{hint}")
    if any(row.texts for row in rows):
        return RowSource(path, len(rows), partial(_listed, rows))
    for number, row in enumerate(rows):
        folder, *inside = row.name.split(os.sep)[1:]
        if inside and not row.problem:
            label = label_of_folder(folder)
            rows[number] = row._replace(captions=[label] if label else [], label=label)
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    return RowSource(path, len(rows), partial(_listed, rows), tuple(classes))


def label_of_folder(name: str) -> str:
    """Returns the label of a class by its folder's name: _ becomes a space, then as by `clean`."""
    return clean(name.replace("_", " "))


def _images(path: str) -> Iterator[PairRow]:
    """Yields the images in a folder with the texts beside them, in order of names."""
    for folder, subfolders, files in os.walk(path, onerror=_refuse):
        subfolders.sort()
        place = os.path.join(os.path.basename(path), os.path.relpath(folder, path))
        by_key: dict[str, dict[str, str]] = defaultdict(dict)  # file -> suffix
        for file in sorted(files):
            key, suffix = os.path.splitext(os.path.join(folder, file))
            by_key[key][key + suffix] = suffix[1:].lower()
        for key, suffixes in sorted(by_key.items()):
            name = os.path.normpath(os.path.join(place, os.path.basename(key)))
            texts = {suffix: file for file, suffix in suffixes.items() if suffix in ("txt", "json")}
            images = [file for file, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
            others = [file for file, suffix in suffixes.items() if suffix in OTHER_IMAGE_SUFFIXES]
            for file in images or others:
                problem = None
                if not images:
                    problem = f"{suffixes[file]} image", f"not read; {CONVERT}"
                yield PairRow(name, file, texts=texts, problem=problem)


def _refuse(error: OSError) -> None:
    """Raises InputError for a folder that cannot be read; `os.walk` would pass over it."""
    raise InputError(
        f"source: expected folders that can be read, got {error.filename!r}: {error.strerror}"
    ) from error
