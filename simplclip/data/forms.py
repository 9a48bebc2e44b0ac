"""What `simplclip data pack` reads: tables, JSON files and folders, as a stream of rows that name an image and its captions.

tables.py       CSV, TSV, parquet
annotations.py  JSON of Karpathy's and COCO's kind, or a list of objects
folders.py      folders of images with texts beside them, or by class

Nothing here imports torch, so that packing a few hundred images takes a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TABLES = (".csv", ".tsv", ".parquet")
JSON = ".json"
# Columns of tables, and keys of the objects of JSON files, in order of preference: the first of these names that a file has.
IMAGE_NAMES = ("filepath", "image_path", "path", "image", "file_name", "filename", "file", "image_name")
CAPTION_NAMES = ("captions", "caption", "sentences", "title", "text", "raw", "comment")


class Row(NamedTuple):
    """An image with its captions, not read yet."""

    name: str  # in messages, and "source" in the sample's json
    image: str  # path of the image
    captions: list[Any] = []  # noqa: RUF012 (of a row alone: tables and JSON give each row its list)
    texts: Mapping[str, str] = {}  # noqa: RUF012  suffix (txt, json) -> path of a file beside the image
    label: str | None = None


class BadRow(NamedTuple):
    """A row that has no image or no captions: the reason under which it is counted, and a detail."""

    name: str
    reason: str
    detail: str = ""


Rows = Iterator[Row | BadRow]


@dataclass(frozen=True)
class Options:
    """Options of tables and JSON files.

    image_key, caption_key: columns, or keys of objects; by default the first of IMAGE_NAMES and CAPTION_NAMES.
    images: folder of the images; by default the file's own.
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
class Source:
    """A source of rows.

    total: the number of its rows, for the progress; None if counting them is as much work as reading them.
    state: what tells whether the source has changed, as JSON.
    rows: starts to read its rows.
    """

    path: str
    total: int | None
    state: dict[str, Any] = field(compare=False)
    rows: Callable[[], Rows]

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))


def key_in(names: Iterable[str], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """Returns the one of `names` to read: `wanted`, if given, or else the first of `usual` there; None if there is none."""
    return next((name for name in ((wanted,) if wanted else usual) if name in names), None)


def is_source(path: str | os.PathLike) -> bool:
    """Whether `packed` makes shards of a path: of a table, a JSON file (also FILE.json#SPLIT) or a folder."""
    text = os.path.expanduser(os.fspath(path))
    if not os.path.exists(text) and ("://" in text or text.startswith("pipe:")):
        return False
    file, _ = split_of(text)
    return file.lower().endswith((*TABLES, JSON)) or os.path.isdir(file)


def split_of(path: str) -> tuple[str, str]:
    """Splits FILE.json#SPLIT, unless a file has this name."""
    file, sharp, split = path.rpartition("#")
    return (file, split) if sharp and file.lower().endswith(JSON) and not os.path.exists(path) else (path, "")


def file_state(path: str, options: Options) -> dict[str, Any]:
    """Returns the state of a file: its size and time, and the options by which it is read."""
    about = os.stat(path)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns, **given}
