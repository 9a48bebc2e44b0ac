"""A row, an image with its captions, as the readers of tables, JSON and folders yield it; and what
these readers share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, BinaryIO, ClassVar, NamedTuple

from simplclip.common.errors import InputError
from simplclip.common.files import size_and_time

# Columns of tables, in order of preference: the first of these names that a table has.
# fmt: off
IMAGE_NAMES: tuple[str, ...] = (
    "filepath", "image_path", "path", "image", "file_name", "filename", "file", "image_name",
)
# fmt: on
CAPTION_NAMES: tuple[str, ...] = ("captions", "caption", "title", "text", "comment")

LINE_BYTES = 1 << 24  # most bytes of a line


class PairRow(NamedTuple):
    """An image with its captions, not read yet."""

    name: str  # in messages, and "source" in the sample's json
    image: str = ""  # path of the image
    captions: Sequence[object] = ()
    # suffix (txt, json) -> path of a file beside the image
    texts: Mapping[str, str] | None = None
    label: str | None = None
    # of a row without image or captions: the reason that is counted, and a detail
    problem: tuple[str, str] | None = None
    # of a table, the image as it is written there: rows of one image may be no neighbours
    group: str | None = None
    encoded: bytes | None = None  # the image file, if the table holds it in place of a path


@dataclass(frozen=True)
class RowSource:
    """A source of rows."""

    path: str
    total: int  # number of rows
    state: Callable[[], dict[str, Any]]  # JSON that tells whether the source has changed
    rows: Callable[[], Iterator[PairRow]]  # starts to read them
    classes: tuple[str, ...] = ()  # of a folder with a folder for each class: their names, in order
    embedded: bool = False  # whether the rows hold the image files, and so are large

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
    split: str | None = None  # name of a split in a JSON file

    def image(self, file: str, path: str) -> str:
        """Returns where an image is that the file `file` names `path`; an address stays."""
        if is_address(path):
            return path
        if self.images is None:
            return os.path.join(os.path.dirname(file), path)
        return os.path.join(os.path.expanduser(self.images), path)

    def given(self) -> dict[str, str]:
        """Returns the options that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Reader:
    """A kind of file that has rows; a subclass in a file of its own stands in `readers.READERS`."""

    endings: ClassVar[tuple[str, ...]]  # of its files' names, in lower case
    about: ClassVar[str]  # what such a file is, for the help
    options: ClassVar[tuple[str, ...]] = ("images", "image_key", "caption_key")  # that it takes
    # name of a file that names the images of a folder, as in Hugging Face's imagefolder
    metadata: ClassVar[str | None] = None

    @classmethod
    def read(cls, path: str, options: Options) -> RowSource:
        """Returns the rows of a file. Raises InputError for other content and missing columns."""
        raise NotImplementedError


NO_OPTIONS = Options()
OPTION_NAMES = tuple(Options.__dataclass_fields__)


def is_address(text: str) -> bool:
    """Whether a text has the form of a URL or pipe:COMMAND; nothing is looked up."""
    return text.startswith("pipe:") or "://" in text


def file_source(
    path: str,
    options: Options,
    total: int,
    rows: Callable[[], Iterator[PairRow]],
    *,
    embedded: bool = False,
) -> RowSource:
    """Returns the source of a file's rows, whose state is its size and time, and the options."""

    def state() -> dict[str, Any]:
        return {**size_and_time(path), **options.given()}

    return RowSource(path, total, state, rows, embedded=embedded)


def line_count(file: BinaryIO) -> int:
    """Returns the number of line ends from the position of an open file on, which moves."""
    return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def columns_of(titles: list[str], path: str, options: Options) -> list[str]:
    """Returns the names of the columns of images and of captions, from `titles`."""
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


def texts_of(captions: object) -> list[str]:
    """Returns the captions of a row, a list or one, as texts; dates and structs are none."""
    texts = []
    for value in captions if isinstance(captions, list) else [captions]:
        caption = value.decode() if isinstance(value, bytes) else value
        if isinstance(caption, (str, int, float, Decimal)) and not isinstance(caption, bool):
            texts.append(str(caption))
    return texts


def table_row(name: str, image: object, texts: list[str], path: str, options: Options) -> PairRow:
    """Returns the row of an image, a path or a file's bytes, of the table `path`."""
    if isinstance(image, bytes) and image:
        digest = hashlib.blake2b(image, digest_size=16).hexdigest()
        return PairRow(name, captions=texts, group=digest, encoded=image)
    if isinstance(image, str) and image:
        return PairRow(name, options.image(path, image), texts, group=image)
    return PairRow(name, problem=("missing image", ""))


def merged_by_image(rows: Iterator[PairRow]) -> Iterator[PairRow]:
    """Yields neighbouring rows of one image as one row, with the first's name."""
    joined: PairRow | None = None
    joined_image: str | None = None
    captions: list[object] = []  # of the joined row
    for row in rows:
        # the path in full; a table that holds the files has none
        image = None if row.problem else row.image or row.group
        if joined is not None and image is not None and image == joined_image:
            captions += row.captions
            continue
        if joined is not None:
            yield joined
        captions = [*row.captions]
        joined = row._replace(captions=captions)
        joined_image = image
    if joined is not None:
        yield joined
