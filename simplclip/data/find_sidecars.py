"""Sidecars: folders of tars with the names of the data's shards, whose files are joined to the
samples by key.

    data/train-000000.tar       KEY.jpg, KEY.txt
    taught/train-000000.tar     KEY.teacher.npy, KEY.teacher.json

A sidecar's file replaces the sample's file of the same suffix. A sidecar has its samples in the
order of the shard, and may lack some. `simplclip teacher` and `simplclip caption` write sidecars
(write_sidecars.py), read_tars.py reads them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.errors import ShardError
from simplclip.data.find_sources import Address, Source, name_of, sources_of
from simplclip.data.samples import json_of

Folders = Sequence[str | os.PathLike]
_LEAST = 1024  # bytes of a sample in a tar
_WIDEST = 1 << 20  # numbers of a feature


def plain_name(shard: str) -> str:
    """Returns the file name of a shard's sidecar: the shard's own, without the .gz of a file that a
    command unpacks.
    """
    return re.sub(r"\.(gz|xz|bz2|zst)$", "", name_of(shard))


def beside(shard: str, folders: Folders) -> list[str]:
    """Returns the paths of a shard's sidecars in `folders`. Raises ShardError if one is missing."""
    paths = [os.path.join(os.path.expanduser(folder), plain_name(shard)) for folder in folders]
    for path in paths:
        if not os.path.isfile(path):
            raise ShardError(
                f"shard {str(shard)!r} has no sidecar {path!r}; run the command that wrote its "
                "folder on this shard too"
            )
    return paths


def by_name(sources: Iterable[Source]) -> dict[str, Source]:
    """Returns sources by the names of their sidecars. Raises InputError for two of one name."""
    named: dict[str, Source] = {}
    for source in sources:
        first = named.setdefault(plain_name(source.url), source)
        if first.url != source.url:
            got = f"{str(first.url)!r} and {str(source.url)!r}"
            raise InputError(
                f"shards: expected files of different names, since sidecars go by them, got {got}"
            )
    return named


def check_sidecars(sources: Iterable[Source], folders: Folders) -> None:
    """Raises InputError for paths that are no folders or shards of one name, ShardError for a
    missing or stale sidecar.

    A shard that has changed since its sidecar was made is noticed by its size, if the sidecar's
    meta.json has the size.
    """
    if isinstance(folders, (str, os.PathLike)):
        raise InputError(f"sidecars: expected a list of folders, got {folders!r}")
    shards = [source.url for source in by_name(sources).values()] if folders else []
    for folder in map(os.path.expanduser, folders):
        if not os.path.isdir(folder):
            raise InputError(f"sidecars: expected folders, got {str(folder)!r}, which is none")
        listed = entries(folder)
        for shard in shards:
            (path,) = beside(shard, [folder])
            source = listed.get(os.path.basename(path), {}).get("source")
            size = source.get("bytes") if isinstance(source, dict) else None
            if size is not None and os.path.exists(shard) and os.path.getsize(shard) != size:
                raise ShardError(
                    f"shard {shard!r} has changed since its sidecar {path!r} was made: expected "
                    f"{size} bytes, got {os.path.getsize(shard)}; run the command that wrote the "
                    "sidecar again"
                )


def entries(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Reads the entries of a folder's meta.json, by the file name of the shard or sidecar; {}
    without a valid meta.json.
    """
    try:
        splits = json_of(Path(folder, "meta.json").read_text("utf-8"))["splits"].values()
        named = [item for split in splits for item in split["shards"].items()]
        return {name: entry for name, entry in named if isinstance(entry, dict)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def teacher_stamp(folders: Folders) -> dict[str, Any]:
    """Returns the teacher of the features in sidecars: "name", "width" D, "logit_scale", and
    "views" if it saw views.

    The last of the folders whose meta.json names a teacher counts. Raises ShardError if there is
    none.
    """
    for folder in reversed(folders):
        try:
            stamp = json_of(Path(os.path.expanduser(folder), "meta.json").read_text("utf-8"))[
                "teacher"
            ]
            stamp |= {
                "name": str(stamp["name"]),
                "width": int(stamp["width"]),
                "logit_scale": float(stamp["logit_scale"]),
            }
            stamp.get("views", {"augment": None})["augment"]
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            continue
        if 1 <= stamp["width"] <= _WIDEST and 0 < stamp["logit_scale"] < math.inf:
            return stamp
    given = list(map(str, folders))
    raise ShardError(
        "data.sidecars: expected a teacher's features, which `simplclip teacher` writes, got "
        f"{given}"
    )


def dataset_size(shards: Any) -> int | None:
    """Returns the samples of a pass over shards, with their weights, as the meta.json beside them
    counts them.

    None if a shard is a stream, or is not listed with its present size, and if there is less than
    one sample.
    """
    sources = sources_of(shards)
    listed = {
        folder: entries(folder) for folder in {os.path.dirname(source.url) for source in sources}
    }
    total = 0.0
    for source in sources:
        entry = listed[os.path.dirname(source.url)].get(os.path.basename(source.url), {})
        try:
            samples, size = int(entry["samples"]), int(entry["bytes"])
            if (
                isinstance(source.url, Address)
                or size != os.path.getsize(source.url)
                or not 0 <= samples <= size / _LEAST
            ):
                return None
            total += samples * source.weight
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            return None
    return round(total) or None
