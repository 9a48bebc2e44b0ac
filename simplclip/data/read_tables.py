"""What `simplclip data pack` reads: tables, JSON files and folders, each as a stream of rows with
an image and its captions.

    .csv, .tsv, .parquet    a row for each caption; neighbouring rows of one image are one sample
    .json                   in Karpathy's or COCO's format
    a folder                KEY.txt or KEY.json beside KEY.jpg, or a folder of images for each class

Text is UTF-8, with or without byte order mark. Nothing here imports torch, so that packing some
images takes a second.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from simplclip.common.errors import InputError
from simplclip.data.decode_images import IMAGE_SUFFIXES
from simplclip.data.errors import BrokenSample
from simplclip.data.samples import TEXT_BYTES, clean, file_bytes, json_of, state_of

TABLES = (".csv", ".tsv", ".parquet")
JSON = ".json"
# Columns of tables, in order of preference: the first of these names that a table has.
IMAGE_NAMES = (
    "filepath",
    "image_path",
    "path",
    "image",
    "file_name",
    "filename",
    "file",
    "image_name",
)
CAPTION_NAMES = ("captions", "caption", "title", "text", "comment")
SEPARATORS = "\t,|;"
LINE = 1 << 24  # most bytes of a line


class Row(NamedTuple):
    """An image with its captions, not read yet."""

    name: str  # in messages, and "source" in the sample's json
    image: str = ""  # path of the image
    captions: list[Any] = []  # noqa: RUF012 (never changed)
    texts: Mapping[str, str] = {}  # noqa: RUF012  suffix (txt, json) -> path of a file beside the image
    label: str | None = None
    # of a row without image or captions: the reason that is counted, and a detail
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Options:
    """Options of tables and JSON files.

    image_key, caption_key: columns of a table; by default the first of IMAGE_NAMES and
    CAPTION_NAMES. images: folder of the images; by default the file's own.
    split: name of a split in a JSON file.
    """

    image_key: str | None = None
    caption_key: str | None = None
    images: str | None = None
    split: str | None = None

    def image(self, file: str, path: str) -> str:
        """Returns where the image `path`, as `file` names it, lies."""
        folder = os.path.dirname(file) if self.images is None else os.path.expanduser(self.images)
        return path if path.startswith("pipe:") or "://" in path else os.path.join(folder, path)


@dataclass(frozen=True)
class RowSource:
    """A source of rows. total: their number. state: JSON that tells whether it has changed. rows:
    starts to read them.
    """

    path: str
    total: int
    state: Callable[[], dict[str, Any]]
    rows: Callable[[], Iterator[Row]]
    classes: tuple[str, ...] = ()  # of a folder with a folder for each class: their names, in order

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))


def is_source(path: str | os.PathLike) -> bool:
    """Whether `packed` makes shards of a path: of a table, a JSON file (also FILE.json#SPLIT) or a
    folder.
    """
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and ("://" in text or text.startswith("pipe:")):
        return False
    file, _ = split_of(text)
    return file.lower().endswith((*TABLES, JSON)) or os.path.isdir(file)


def open_source(path: str | os.PathLike, options: Options) -> RowSource:
    """Returns the rows of a table, a JSON file or a folder.

    Raises InputError if it is none, or lacks a column.
    """
    file, split = split_of(os.path.expanduser(os.fspath(path)))
    options = Options(**vars(options) | {"split": split}) if split else options
    kind = file.lower()
    if not os.path.exists(file):
        raise InputError(
            f"source: expected a table, a JSON file or a folder, got {file!r}, which does not exist"
        )
    given = {name: value for name, value in vars(options).items() if value is not None}
    used = ("images", "split") if kind.endswith(JSON) else ("images", "image_key", "caption_key")
    for name in given.keys() - (() if os.path.isdir(file) else used):
        raise InputError(
            f"{name}: expected none, as {file!r} has no such part, got {given[name]!r}"
        )
    if os.path.isdir(file):
        return _folder(file)
    if not kind.endswith((*TABLES, JSON)) or not os.path.isfile(file):
        expected = "a folder of images, or a file that ends in .csv, .tsv, .parquet or .json"
        hint = "; training reads tars as they are" if ".tar" in kind else ""
        raise InputError(f"source: expected {expected}, got {file!r}{hint}")
    total, rows = (
        _json if kind.endswith(JSON) else _parquet if kind.endswith(".parquet") else _table
    )(file, options)
    return RowSource(file, total, lambda: {**state_of(file), **given}, rows)


def split_of(path: str) -> tuple[str, str]:
    """Splits FILE.json#SPLIT, unless a file has this name."""
    file, sharp, split = path.rpartition("#")
    return (
        (file, split)
        if sharp and file.lower().endswith(JSON) and not os.path.exists(path)
        else (path, "")
    )


def _table(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    with open(path, "rb") as file:
        header = file.readline(LINE)
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
        with open(path, "rb") as file:
            file.readline(LINE)
            for number, record in enumerate(_records(file, separator)):
                name = f"{os.path.basename(path)}/{number:09d}"
                if isinstance(record, str):
                    yield Row(name, problem=("bad row", record))
                elif len(record) <= max(image, caption) or any(record[len(titles) :]):
                    yield Row(
                        name,
                        problem=("bad row", f"expected {len(titles)} columns, got {len(record)}"),
                    )
                # by surrogateescape
                elif any("\udc80" <= character <= "\udcff" for character in record[caption]):
                    yield Row(name, problem=("caption not UTF-8", ""))
                else:
                    yield _row(name, record[image].strip(), [record[caption]], path, options)

    return max(1, total), lambda: _joined(rows())


def _records(file: BinaryIO, separator: str) -> Iterator[list[str] | str]:
    """Yields the records of a table; in place of a bad one, the reason.

    Empty lines are no records.

    A quoted field may span several lines. A record with a quote that is not closed, or with a field
    above csv's limit, ends with its first line, so that no other record is lost.
    """
    while first := file.readline(LINE):
        if not first.strip(b"\r\n"):
            continue
        behind, read_all = file.tell(), False

        def lines(first: bytes = first) -> Iterator[str]:
            nonlocal read_all
            for line in itertools.chain([first], iter(lambda: file.readline(LINE), b"")):
                yield line.decode(errors="surrogateescape")
            read_all = True

        try:
            record: list[str] | str = next(csv.reader(lines(), delimiter=separator))
        except csv.Error as error:
            record = str(error)
        if read_all:
            record = "expected a quote at its end, got none"
        if isinstance(record, str):
            file.seek(behind)
        yield record


def _parquet(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"source: expected a parquet file, got {path!r}: {error}") from None
    columns = _columns(file.schema_arrow.names, path, options)

    def pairs() -> Iterator[tuple[Any, ...]]:
        try:
            for batch in file.iter_batches(4096, columns=columns):
                yield from zip(*(batch.column(name) for name in columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"source: expected a parquet file, got {path!r}, which is damaged: {error}"
            ) from None

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (UnicodeDecodeError, pyarrow.ArrowException):
            return None

    def rows() -> Iterator[Row]:
        for number, (image, caption) in enumerate(map(value, pair) for pair in pairs()):
            captions = (
                caption if isinstance(caption, list) else [] if caption is None else [str(caption)]
            )
            yield _row(f"{os.path.basename(path)}/{number:09d}", image, captions, path, options)

    return file.metadata.num_rows, lambda: _joined(rows())


def _row(name: str, image: Any, captions: list[Any], path: str, options: Options) -> Row:
    if not isinstance(image, str) or not image:
        return Row(name, problem=("missing image", ""))
    return Row(name, options.image(path, image), captions)


def _joined(rows: Iterator[Row]) -> Iterator[Row]:
    """Joins neighbouring rows of one image, as tables of several captions an image have them."""
    for _, group in itertools.groupby(rows, lambda row: row.name if row.problem else row.image):
        first, *more = group
        yield first._replace(
            captions=[*first.captions, *(text for row in more for text in row.captions)]
        )


def _columns(titles: list[str], path: str, options: Options) -> list[str]:
    """Returns the columns of images and captions."""
    columns = []
    for option, usual in (("image_key", IMAGE_NAMES), ("caption_key", CAPTION_NAMES)):
        wanted = getattr(options, option)
        title = next((title for title in ((wanted,) if wanted else usual) if title in titles), None)
        if title is None:
            got = f"{path!r} with the columns {', '.join(map(repr, titles))[:300]}"
            raise InputError(
                f"source: expected a table with a column {wanted or ' or '.join(usual)} "
                f"({option}), got {got}"
            )
        columns.append(title)
    return columns


def _json(path: str, options: Options) -> tuple[int, Callable[[], Iterator[Row]]]:
    """Several entries of one image are one sample with all captions."""
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
        of_split = f" of the split {options.split!r}" if options.split else ""
        raise InputError(f"source: expected images with captions, got none{of_split} in {path!r}")
    name = os.path.basename(path)
    rows = [
        Row(f"{name}/{image}", options.image(path, image), texts)
        for image, texts in captions.items()
    ]
    return len(rows), lambda: iter(rows)


def _entries(content: Any, path: str, options: Options) -> Iterator[tuple[str, list[Any]]]:
    """Yields images with captions. Raises the error of any other content, e.g. KeyError."""
    images = content["images"]
    if "annotations" in content:  # COCO's captions_val2017.json
        files = {image["id"]: image["file_name"] for image in images}
        for entry in content["annotations"]:
            yield (
                str(files.get(entry["image_id"], f"image_id {entry['image_id']}")),
                [entry["caption"]],
            )
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


def _folder(path: str) -> RowSource:
    """The images of a folder and of its subfolders, in the order of names.

    If no image has a text beside it, the folders in `path` are classes: the label of an image, and
    its caption.
    """
    path = path.rstrip(os.sep) or path
    counts = Counter(bool(texts) for _, texts in _images(path))
    images, any_text = counts.total(), counts[True] > 0
    if not images:
        hint = " (try its *.tar)" if any(file.endswith(".tar") for file in os.listdir(path)) else ""
        raise InputError(
            f"source: expected a folder of images with captions, got {path!r}, which has no "
            f"image{hint}"
        )

    def state() -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for image, texts in _images(path):
            # it is no sample; a run's own curves.png may lie in the folder
            if any_text and not texts:
                continue
            digest.update(repr((image, texts)).encode("utf-8", "surrogateescape"))
            for text in texts.values():
                # which is counted when the row is read
                with contextlib.suppress(OSError, BrokenSample):
                    digest.update(file_bytes(os.path.join(path, text), TEXT_BYTES))
        return {"images": counts[any_text], "names": digest.hexdigest()}

    def rows() -> Iterator[Row]:
        for image, texts in _images(path):
            folder, *inside = image.split(os.sep)
            label = label_of_folder(folder) if inside and not any_text else None
            beside = {suffix: os.path.join(path, text) for suffix, text in texts.items()}
            name = os.path.join(os.path.basename(path), os.path.splitext(image)[0])
            yield Row(name, os.path.join(path, image), [label] if label else [], beside, label)

    classes = (
        ()
        if any_text
        else tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    )
    return RowSource(path, images, state, rows, classes)


def label_of_folder(name: str) -> str:
    """Returns the label of a class by the name of its folder."""
    return clean(name.replace("_", " "))


def _images(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields images, and by suffix the texts beside them, relative to `path`.

    Subfolders of a linked folder are left out.
    """
    for place, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        # a link may lead anywhere, also to a folder that contains it
        if place != path and os.path.islink(place):
            folders.clear()
        inside = "" if place == path else os.path.relpath(place, path)
        samples: defaultdict[str, dict[str, str]] = defaultdict(dict)  # of each key: file -> suffix
        for file in sorted(files):
            key, suffix = os.path.splitext(file)
            samples[key][os.path.join(inside, file)] = suffix[1:].lower()
        for _, sample in sorted(samples.items()):
            texts = {suffix: file for file, suffix in sample.items() if suffix in ("txt", "json")}
            yield from (
                (file, texts) for file, suffix in sample.items() if suffix in IMAGE_SUFFIXES
            )
