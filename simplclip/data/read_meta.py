"""Reads the meta.json of a folder of tars, which write_tars.py writes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simplclip.data.errors import ShardError
from simplclip.data.find_sources import Address, Source, sources_of
from simplclip.data.samples import json_of

_SAMPLE_BYTES = 1024  # the least that a sample takes in a tar
_MAX_WIDTH = 1 << 20  # numbers of a feature
# what a meta.json with other content than expected raises
_OTHER_CONTENT = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def tar_entries(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Returns {file name of a tar: its entry} of a folder's meta.json; {} without a valid one."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        for split in _read(folder)["splits"].values():
            for name, entry in split["shards"].items():
                if isinstance(entry, dict):
                    entries[name] = entry
    except _OTHER_CONTENT:
        return {}
    return entries


def teacher_stamp(folders: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Returns what sidecar folders' meta.json says of the teacher whose features they have.

    Keys are "name", "width" (numbers of a feature), "logit_scale", "views" if it saw views, and
    more. The last of the folders whose meta.json names a teacher counts. Raises ShardError if there
    is none.
    """
    for folder in reversed(folders):
        try:
            stamp = _converted_stamp(_read(folder))
        except _OTHER_CONTENT:
            continue
        if 1 <= stamp["width"] <= _MAX_WIDTH and 0 < stamp["logit_scale"] < math.inf:
            return stamp
    names = [str(folder) for folder in folders]
    raise ShardError(
        "data.sidecars: expected a teacher's features, which `simplclip teacher` writes, got "
        f"{names}"
    )


def dataset_size(shards: Any) -> int | None:
    """Returns the number of samples in an epoch of shards, from the meta.json beside them.

    A shard counts as often as its weight says. shards: as `sources_of` takes them; they are not
    read. None if a shard is a stream, or is not listed with its present size, and if there is less
    than one sample.
    """
    sources = sources_of(shards)
    total = 0.0
    for count, source in zip(listed_samples(sources), sources):
        if count is None:
            return None
        total += count * source.weight
    return round(total) or None


def listed_samples(sources: Sequence[Source]) -> list[int | None]:
    """Returns the samples of each tar by the meta.json beside it; None as `dataset_size`."""
    folders = {os.path.dirname(source.url) for source in sources}
    entries = {folder: tar_entries(folder) for folder in folders}
    return [_listed_samples(source.url, entries) for source in sources]


def _read(folder: str | os.PathLike) -> Any:
    """Returns the parsed meta.json of a folder. Raises OSError or ValueError."""
    return json_of(Path(os.path.expanduser(folder), "meta.json").read_text("utf-8"))


def _converted_stamp(meta: Any) -> dict[str, Any]:
    """Returns meta["teacher"], a dict, after converting name, width and logit_scale in place."""
    stamp = meta["teacher"]
    stamp |= {
        "name": str(stamp["name"]),
        "width": int(stamp["width"]),
        "logit_scale": float(stamp["logit_scale"]),
    }
    views = stamp.get("views", {"augment": None})
    if not isinstance(views, dict) or "augment" not in views:
        raise ValueError(f"views: expected their augmentation, got {views!r}")
    return stamp


def _listed_samples(url: str, entries: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Returns the samples of a tar by its folder's entries; None if the tar has another size."""
    if isinstance(url, Address):
        return None
    folder, name = os.path.split(url)
    try:
        entry = entries[folder][name]
        samples, size = int(entry["samples"]), int(entry["bytes"])
        if size != os.path.getsize(url):
            return None
    except _OTHER_CONTENT:
        return None
    if not 0 <= samples <= size / _SAMPLE_BYTES:
        return None
    return samples
