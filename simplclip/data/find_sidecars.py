"""Sidecars: folders of tars with the names of the data's shards, whose files are joined to the
samples by key.

    data/train-000000.tar       KEY.jpg, KEY.txt
    taught/train-000000.tar     KEY.teacher.npy, KEY.teacher.json

A sidecar's file replaces the sample's file of the same suffix. A sidecar has its samples in the
order of the shard, and may lack some. `simplclip teacher` and `simplclip caption` write sidecars
(write_sidecars.py), and read_tars.py joins them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from simplclip.common.errors import InputError
from simplclip.data.errors import ShardError
from simplclip.data.find_sources import Source, name_of
from simplclip.data.read_meta import tar_entries

Folders = Sequence[str | os.PathLike]


def sidecar_name(shard: str) -> str:
    """Returns the file name of a shard's sidecars: its own, without a .gz that is unpacked."""
    return re.sub(r"\.(gz|xz|bz2|zst)$", "", name_of(shard))


def sidecars_of(shard: str, folders: Folders) -> list[str]:
    """Returns a shard's sidecars, one in each folder. Raises ShardError if one is no file."""
    paths = [os.path.join(os.path.expanduser(folder), sidecar_name(shard)) for folder in folders]
    for path in paths:
        if not os.path.isfile(path):
            raise ShardError(
                f"shard {str(shard)!r} has no sidecar {path!r}; run the command that wrote its "
                "folder on this shard too"
            )
    return paths


def by_sidecar_name(sources: Iterable[Source]) -> dict[str, Source]:
    """Returns {file name of its sidecars: source}. Raises InputError if two have one name."""
    named: dict[str, Source] = {}
    for source in sources:
        first = named.setdefault(sidecar_name(source.url), source)
        if first.url != source.url:
            got = f"{str(first.url)!r} and {str(source.url)!r}"
            raise InputError(
                f"shards: expected files of different names, since sidecars go by them, got {got}"
            )
    return named


def check_sidecars(sources: Iterable[Source], folders: Folders) -> None:
    """Raises an error unless each folder has a sidecar of each shard as the shard is now.

    A shard that has changed since is noticed by its size, if the folder's meta.json has the size.
    InputError if `folders` is no list of folders or two shards have one file name, ShardError for a
    missing or stale sidecar.
    """
    if isinstance(folders, (str, os.PathLike)):
        raise InputError(f"sidecars: expected a list of folders, got {folders!r}")
    if not folders:
        return
    shards = [source.url for source in by_sidecar_name(sources).values()]
    for folder in map(os.path.expanduser, folders):
        if not os.path.isdir(folder):
            raise InputError(f"sidecars: expected folders, got {str(folder)!r}, which is none")
        entries = tar_entries(folder)
        for shard in shards:
            (sidecar,) = sidecars_of(shard, [folder])
            entry = entries.get(os.path.basename(sidecar), {})
            _check_size(shard, sidecar, entry.get("source"))


def _check_size(shard: str, sidecar: str, source: object) -> None:
    """Raises ShardError if a shard has another size than when its sidecar was made."""
    if not isinstance(source, dict) or source.get("bytes") is None or not os.path.exists(shard):
        return
    expected, size = source["bytes"], os.path.getsize(shard)
    if size != expected:
        raise ShardError(
            f"shard {shard!r} has changed since its sidecar {sidecar!r} was made: expected "
            f"{expected} bytes, got {size}; run the command that wrote the sidecar again"
        )
