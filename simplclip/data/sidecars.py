"""Sidecars: folders of tars with the names of the data's shards, whose files are joined to the samples by key.

    data/train-000000.tar       KEY.jpg, KEY.txt
    taught/train-000000.tar     KEY.teacher.npy, KEY.views.json

A sidecar's file replaces the sample's file of the same suffix. `simplclip teacher` and `simplclip caption` write sidecars.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from simplclip.common.errors import InputError
from simplclip.data import tar
from simplclip.data.addresses import name_of
from simplclip.data.broken import ShardError, Skipped
from simplclip.data.text import json_of

TEACHER = "teacher.npy"
VIEWS = "views.json"
PREFIX = "prefix.npy"

Folders = Sequence[str | os.PathLike]
Sample = dict[str, Any]


def plain_name(shard: str) -> str:
    """Returns the file name of a shard's sidecar or rewritten shard: the shard's own name without .gz, .xz or .bz2."""
    return re.sub(r"\.tgz$", ".tar", re.sub(r"\.(gz|xz|bz2)$", "", name_of(shard)))


def beside(shard: str, folders: Folders) -> list[str]:
    """Returns the paths of a shard's sidecars in `folders`. Raises ShardError if one is missing."""
    found = [os.path.join(os.path.expanduser(folder), plain_name(shard)) for folder in folders]
    for path in found:
        if not os.path.isfile(path):
            raise ShardError(
                f"shard {shard!r} has no sidecar {path!r}; run the command that wrote its folder on this shard too"
            )
    return found


def check(shards: Iterable[str], folders: Folders) -> None:
    """Raises InputError for paths that are no folders or shards of one name, ShardError for a missing or stale sidecar.

    A shard that has changed since its sidecar was made is noticed by its size, if the sidecar's meta.json has the size.
    """
    if isinstance(folders, (str, os.PathLike)):
        raise InputError(f"sidecars: expected a list of folders, got {folders!r}")
    names: dict[str, str] = {}
    for shard in shards if folders else ():
        if names.setdefault(plain_name(shard), shard) != shard:
            raise InputError(
                f"sidecars: expected shards of different file names, got {names[plain_name(shard)]!r} and {shard!r}"
            )
    for folder in map(os.path.expanduser, folders):
        if not os.path.isdir(folder):
            raise InputError(f"sidecars: expected folders, got {str(folder)!r}, which is none")
        made = entries(folder)
        for shard in names.values():
            (path,) = beside(shard, [folder])
            size = made.get(os.path.basename(path), {}).get("source", {}).get("bytes")
            if size is not None and os.path.exists(shard) and os.path.getsize(shard) != size:
                raise ShardError(
                    f"shard {shard!r} has changed since its sidecar {path!r} was made: expected {size} bytes, got "
                    f"{os.path.getsize(shard)}; run the command that wrote the sidecar again"
                )


def entries(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Reads the entries of a folder's meta.json, by the file name of the shard or sidecar; {} without a valid meta.json."""
    try:
        splits = json_of(Path(folder, "meta.json").read_text("utf-8"))["splits"].values()
        return {name: entry for split in splits for name, entry in split["shards"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def joined(samples: Iterable[Sample], shard: str, folders: Folders, skipped: Skipped) -> Iterator[Sample]:
    """Yields the samples of a shard with the Spans of its sidecars' files. Memory: the sidecars' headers of one shard.

    A sample whose key an earlier sample has is left out and counted, since the sidecars' files belong to the earlier one.
    Raises ShardError for a sidecar that is missing or damaged.
    """
    tables = [_files(path) for path in beside(shard, folders)]
    seen: set[str] = set()
    for sample in samples:
        key = sample["__key__"]
        if key in seen:
            skipped.add("duplicate key in tar", f"{name_of(shard)}/{key}")
            continue
        seen.add(key)
        for table in tables:
            files = table.pop(key, {})
            if TEACHER in files:
                sample.pop(VIEWS, None)  # views of the former teacher, whose features are replaced
            sample.update(files)
        yield sample


def _files(path: str) -> dict[str, dict[str, tar.Span]]:
    """Reads the places of a sidecar's files: key -> suffix -> Span."""
    found: dict[str, dict[str, tar.Span]] = {}
    try:
        for name, span in tar.members(path):
            key, suffix = base_plus_ext(name)
            if key is not None:
                found.setdefault(key, {})[suffix.lower()] = span
    except tar.ERRORS as error:
        raise ShardError(f"sidecar {path!r} cannot be read: {error}; make it again by the command that wrote it") from error
    return found
