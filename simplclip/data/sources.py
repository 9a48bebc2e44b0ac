"""Where the pairs lie: tars, local or streamed, tables and folders, in parts that workers read."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data import tables
from simplclip.data.braces import expanded
from simplclip.data.broken import Skipped
from simplclip.data.shards import Sample, ShardError, count_samples, matches, read_shard
from simplclip.data.sidecars import Folders
from simplclip.data.sidecars import check as check_shards
from simplclip.data.streams import Address, is_stream, name_of, names_stream
from simplclip.data.tables import Columns, Piece

RETRIES = (0.2, 1.0, 5.0)  # seconds to wait before a shard that could not be read is tried again
_KEYS = ("shards", "weight", "image_key", "caption_key", "separator")
_FORMS = "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"

Source = Any  # of the pairs: see _FORMS, and `parts_of`


@dataclass(frozen=True)
class Part:
    """What one worker reads in order: a tar, or a piece of a table or of a folder.

    weight: how often an epoch has each of its samples; of a fraction a random share of the samples is taken.
    label: its name, where other parts have the same file name.
    """

    url: str
    weight: float = 1.0
    label: str = ""
    piece: Piece | None = None

    @property
    def name(self) -> str:
        """The name in messages and seeds, which does not change if the data moves."""
        return self.label or name_of(self.url)

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        """options: of `read_shard`."""
        samples = self.piece.read(self.url, skipped) if self.piece else read_shard(self.url, skipped, **options)
        return ({**sample, "__shard__": self.label} for sample in samples) if self.label else samples


def read_part(part: Part, skipped: Skipped, **options: Any) -> Iterator[Sample]:
    """The samples of a part. One that cannot be read is tried again, from where it failed, and then raises ShardError.

    options: of `read_shard`.
    """
    given = 0
    for wait in (*RETRIES, None):
        found = Skipped()
        try:
            for number, sample in enumerate(part.read(found, **options), 1):
                counted = found.take() if found.counts else None
                if number > given:  # the others were given, and what is between them counted, by an earlier try
                    given = number
                    if counted:
                        skipped.merge(counted)
                    yield sample
            skipped.merge(found)
            return
        except (ShardError, OSError) as error:
            if wait is None:
                skipped.merge(found)
                raise error if isinstance(error, ShardError) else ShardError(f"{part.name}: {error}") from error
            time.sleep(wait)


def check_sidecars(parts: list[Part], folders: Folders) -> None:
    """Raises InputError if parts have no place for sidecars, and the errors of `sidecars.check`."""
    for part in parts if folders else ():
        if part.piece:
            raise InputError(f"sidecars: expected tars, whose samples have keys, got {part.url!r}")
    check_shards([part.url for part in parts], folders)


def count(parts: list[Part]) -> list[int] | None:
    """The samples of each part, including broken ones; None if streams, or too many bytes, would have to be read."""
    tars = [part.url for part in parts if part.piece is None]
    found = None if any(map(is_stream, tars)) else count_samples(tars)
    if found is None:
        return None
    of_tars = iter(found)
    return [part.piece.count if part.piece else next(of_tars) for part in parts]


def parts_of(source: Source, name: str = "shards") -> list[Part]:
    """The parts of a source of pairs, which is

    - a tar, plain or compressed, by path, brace pattern (train-{000000..000003}.tar) or glob; patterns may also match the
      following files and folders;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a tar;
    - a list file (.txt) with one of these, but no pipe, in each line; its paths are relative to its folder;
    - a table (.csv, .tsv, .parquet) with the columns of image path, relative to the table's folder, and of caption, in which
      `tables.IMAGE_COLUMNS` and `tables.CAPTION_COLUMNS` are looked for;
    - a folder of images with KEY.txt or KEY.json beside KEY.jpg, also in its folders;
    - image files by path or glob, or a list file of them, which have no captions;
    - a mapping of "shards" (one of these or a list), "weight" (how often an epoch has each sample; of a fraction a random
      share, drawn in each epoch), and for tables "image_key", "caption_key", "separator";
    - a list of these, or of parts.

    What exists is a file, whatever its name begins with, and so is a pathlib.Path: only other texts are commands and URLs.

    name: of the argument, for errors. Raises InputError for what does not exist or is none of these.
    """
    parts = list(_parts(source, name, Columns()))
    if not parts:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    return _labelled(parts)


def _parts(source: Source, name: str, columns: Columns) -> Iterator[Part]:
    if isinstance(source, Part):
        yield source
    elif isinstance(source, (str, os.PathLike)):
        yield from _named(source, name, columns)
    elif isinstance(source, Mapping):
        yield from _weighted(source, name)
    elif isinstance(source, Iterable):
        for one in source:
            yield from _parts(one, name, columns)
    else:
        raise InputError(f"{name}: expected {_FORMS}, got {source!r}")


def _weighted(source: Mapping[str, Any], name: str) -> Iterator[Part]:
    given = {key: value for key, value in source.items() if value is not None}
    if not given.keys() <= set(_KEYS) or "shards" not in given:
        raise InputError(
            f"{name}: expected a mapping with shards and, if need be, {', '.join(_KEYS[1:])}, got {dict(source)}"
        )
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
    columns = Columns(*(given.get(key) for key in _KEYS[2:]))
    parts = list(_parts(given["shards"], name, columns))
    if columns != Columns() and not any(isinstance(part.piece, tables.TABLES) for part in parts):
        raise InputError(f"{name}: expected a table, since {', '.join(_KEYS[2:])} are of tables, got {given['shards']!r}")
    yield from (replace(part, weight=part.weight * weight) for part in parts)


def is_address(source: str | os.PathLike, listed: str | None = None) -> bool:
    """Whether it is no path: URLs and commands are texts that no file is called."""
    return isinstance(source, str) and names_stream(source) and not os.path.exists(os.path.join(listed or "", source))


def addresses(source: Source) -> Iterator[str]:
    """The URLs and commands in a source and in its list files."""
    if isinstance(source, Mapping):
        yield from addresses(source.get("shards", ()))
    elif not isinstance(source, (str, os.PathLike)):
        for one in source:
            yield from addresses(one)
    elif is_address(source):
        yield str(source)
    else:
        try:
            found = matches(os.fspath(source), "shards")
        except InputError:  # nothing is there that could be read
            return
        for path in found:
            if path.lower().endswith(".txt") and os.path.isfile(path):
                yield from (line for _, line in _lines(path) if is_address(line, os.path.dirname(path)))


def _named(source: str | os.PathLike, name: str, columns: Columns, listed: str | None = None) -> Iterator[Part]:
    """The parts of a path, pattern, URL or command. listed: the folder of the list file that has it."""
    text = os.fspath(source)
    if is_address(source, listed):
        if listed is not None and text.startswith("pipe:"):
            raise InputError(
                f"{name}: expected a path or URL in a list file, got {text!r}; commands are taken from the command line or "
                "the config alone"
            )
        yield from (Part(Address(url)) for url in expanded(text, name, escape=False))
        return
    if "://" in text and not os.path.exists(os.path.join(listed or "", text)):
        raise InputError(
            f"{name}: expected {_FORMS}, got {text!r}; of other places the output of a command may be read, e.g. "
            "'pipe:aws s3 cp s3://BUCKET/NAME.tar -'"
        )
    found = matches(text if listed is None else os.path.join(listed, os.path.expanduser(text)), name)
    if _are_images(found):
        yield from (Part(os.path.dirname(found[0]) or ".", piece=piece) for piece in tables.images(found))
        return
    for path in found:
        low = path.lower()
        if os.path.isdir(path):
            yield from (Part(path, piece=piece) for piece in tables.folder(path, name))
        elif low.endswith(tables.SUFFIXES):
            yield from (Part(path, piece=piece) for piece in tables.table(path, columns, name))
        elif not low.endswith(".txt"):
            yield Part(path)
        elif listed is None:
            yield from _listed(path, name, columns)
        else:
            raise InputError(f"{name}: expected tars, tables or folders in a list file, got the list file {path!r}")


def _listed(path: str, name: str, columns: Columns) -> Iterator[Part]:
    lines = _lines(path)
    if not lines:
        raise InputError(f"{name}: expected a list file with one path or URL a line, got {path!r}, which has none")
    folder, names = os.path.dirname(path), [line for _, line in lines]
    if _are_images(names) and not any(is_address(line, folder) for line in names):
        pieces = tables.images([os.path.join(folder, os.path.expanduser(line)) for line in names])
        yield from (Part(folder or ".", piece=piece) for piece in pieces)
        return
    for number, line in lines:
        yield from _named(line, f"{name}: line {number} of {path!r}", columns, folder)


def _are_images(paths: list[str]) -> bool:
    return all(path.lower().endswith(tables.IMAGES) for path in paths)


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines of a list file, with their numbers."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _labelled(parts: list[Part]) -> list[Part]:
    """Parts of other files with the same name, such as a/000.tar and b/000.tar, are named by their folders too.

    Their samples may have the same keys, and the name decides which are the same.
    """
    urls: dict[str, set[str]] = {}
    for part in parts:
        urls.setdefault(name_of(part.url), set()).add(part.url)
    labels = {}
    for several in urls.values():
        if len(several) > 1:
            tails = [{url: "/".join(PurePath(url).parts[-depth:]) for url in several} for depth in (2, 3, 4, 5)]
            distinct = next((tail for tail in tails if len(set(tail.values())) == len(several)), {})
            labels |= {url: distinct.get(url, url) for url in several}
    return [replace(part, label=labels[part.url]) if part.url in labels else part for part in parts]
