"""A row, which read_tables.py and read_folders.py yield: an image with its captions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """An image with its captions, not read yet."""

    name: str  # in messages, and "source" in the sample's json
    image: str = ""  # path of the image
    captions: list[Any] = []  # noqa: RUF012 (never changed)
    # suffix (txt, json) -> path of a file beside the image
    texts: Mapping[str, str] = {}  # noqa: RUF012
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
    state: Callable[[], dict[str, Any]]  # JSON that tells whether the source has changed
    rows: Callable[[], Iterator[Row]]  # starts to read them
    classes: tuple[str, ...] = ()  # of a folder with a folder for each class: their names, in order

    @property
    def name(self) -> str:
        """The last part of the path, which names the source in messages."""
        return os.path.basename(os.path.abspath(self.path))
