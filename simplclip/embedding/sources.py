"""Images to embed, with or without captions: those of `data.parts_of`, lists and globs of image files, and JSON files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplclip.data import parts_of
from simplclip.data.broken import BrokenSample, ShardError, Skipped
from simplclip.data.shards import IMAGE_SUFFIXES, Sample, captions_of, contents, file_bytes, image_of, place_of, read_shard
from simplclip.data.sources import Part, count, is_address, read_part
from simplclip.data.stream import Entry, Source
from simplclip.data.streams import is_stream
from simplclip.data.tables import ROWS, FolderPiece
from simplclip.data.tar import Span
from simplclip.data.text import json_of
from simplclip.evaluation.sources import IMAGES, Table, table


@dataclass
class Placed(Entry):
    """A sample and where its image lies: in a shard, by its key, or in a file of its own."""

    shard: str = ""
    image_path: str = ""


@dataclass
class Images:
    """The images of parts; their captions are not needed."""

    parts: list[Part]
    classes: list[str] | None = None
    templates: list[str] | None = None

    def __str__(self) -> str:
        return f"{len(self.parts)} part(s), the first {self.parts[0].name!r},"

    def __len__(self) -> int:
        """0 if it is not known without reading streams or many bytes."""
        return sum(count(self.parts) or ())

    @property
    def streamed(self) -> bool:
        return any(is_stream(part.url) for part in self.parts)

    def items(self, skipped: Skipped) -> Iterator[Sample]:
        return (sample for part in self.parts for sample in read_part(part, skipped))

    def place(self, item: Sample) -> str:
        return place_of(item)

    def open(self, item: Sample) -> Placed:
        image, shard = image_of(item), item["__url__"]
        if image is None:
            raise BrokenSample("missing image", "")
        own = isinstance(image, Span) and image.file != shard
        if own:
            place = {"image_path": os.path.abspath(image.file)}
        else:
            place = {"shard": shard if is_stream(shard) else os.path.abspath(shard)}
        names = ("__key__", "__url__", *IMAGE_SUFFIXES, "json", "txt")
        files = contents({name: item[name] for name in names if name in item})
        return Placed(item["__key__"], image_of(files), _captions(files), **place)


@dataclass
class Rows(Table):
    """The images of a JSON file."""

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, item: tuple[str, list[str]]) -> Placed:
        path = self.images / item[0]
        try:
            return Placed(item[0], file_bytes(path), item[1], image_path=os.path.abspath(path))
        except OSError as error:
            raise BrokenSample("missing image", error) from None


def _captions(files: Sample) -> list[str]:
    """Those that can be read; a broken caption is no reason to leave out its image."""
    try:
        record = json_of(files.get("json", b"{}"))
        return captions_of(files, record if isinstance(record, dict) else {})
    except (BrokenSample, ValueError):
        return []


def images(what: Any) -> Source:
    """The images that `what` names: all that `data.parts_of` takes, image files by path, glob or in a list file (.txt), and
    the JSON files of `evaluation.source`. Raises InputError for what does not exist or is none of these.
    """
    if isinstance(what, (str, os.PathLike)) and not is_address(what):
        path = os.path.expanduser(os.fspath(what))
        file, _, split = path.partition("#")
        if file.endswith(".json"):
            found = table(Path(file), split or "test", Path(file).parent)
            return Rows(found.name, found.rows, found.images)
        paths = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if path.endswith(".txt") and os.path.isfile(path):
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
                listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            paths = [os.path.join(os.path.dirname(path), line) for line in listed]
        if paths and all(path.lower().endswith(IMAGES) for path in paths):
            return Images(_files(paths))
    return Images(parts_of(what, "source"))


def _files(paths: list[str]) -> list[Part]:
    names = [os.fsencode(os.path.abspath(path)) + b"\0" for path in paths]
    parts = [names[i : i + ROWS] for i in range(0, len(names), ROWS)]
    return [Part("", piece=FolderPiece(len(part), b"".join(part))) for part in parts]


def encoded(places: list[tuple[str, str, str]]) -> list[bytes | str]:
    """For each key, shard and image_path the image file, or why it cannot be read. Shards are read once, by their headers.

    A shard that is a URL or a command, as whatever is no absolute path, is not fetched again: the places come from a file,
    which must not run commands.
    """
    wanted: dict[str, set[str]] = {}
    for key, shard, _ in places:
        if os.path.isabs(shard):
            wanted.setdefault(shard, set()).add(key)
    found = {shard: _of_shard(shard, keys) for shard, keys in wanted.items()}
    return [_one(key, shard, path, found) for key, shard, path in places]


def _of_shard(shard: str, keys: set[str]) -> dict[str, Sample] | str:
    missing, samples = set(keys), {}
    if not os.path.exists(shard):
        return "shard not found"
    try:
        for sample in read_shard(shard, Skipped()):
            if sample["__key__"] in missing:
                missing.remove(sample["__key__"])
                samples[sample["__key__"]] = sample
                if not missing:
                    break
    except (ShardError, OSError):
        return "shard unreadable"
    return samples


def _one(key: str, shard: str, path: str, found: dict[str, dict[str, Sample] | str]) -> bytes | str:
    try:
        if path:
            return file_bytes(path)
        if not shard:
            return ""
        if shard not in found:
            return "in a stream"
        samples = found[shard]
        if isinstance(samples, str):
            return samples
        image = image_of(contents(samples[key])) if key in samples else None
        return image if image is not None else "not in its shard"
    except FileNotFoundError:
        return "file not found"
    except (OSError, BrokenSample) as error:
        return f"unreadable: {error}"
