"""`simplclip data index`: makes the index files of shards. index.py describes their contents."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplclip.common.errors import InputError
from simplclip.common.files import locked, remove_leftovers
from simplclip.common.progress import Progress
from simplclip.data import index, tar
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode, size_of
from simplclip.data.pairs import expand
from simplclip.data.pool import cores, ordered, processes
from simplclip.data.shards import (
    UNREADABLE,
    Sample,
    ShardError,
    Shards,
    check_sizes,
    contents,
    image_of,
    parse,
    place_of,
    read_shard,
)
from simplclip.data.tar import Span

HEAD = 1 << 15  # bytes of an image that are read for its size; most headers fit
MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
FORMATS = ("unknown", *MAGIC)


class SampleInfo(NamedTuple):
    """One sample's part of an index."""

    key: str
    width: int
    height: int
    format: int
    bytes: int
    characters: list[int]
    broken: str  # the reason, or ""


def run(
    shards: Shards,
    *,
    out: str | os.PathLike | None = None,
    decoded: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the index of each shard that has none, or whose index does not fit it or, if `decoded`, was made without.

    Args:
        shards: as for `make_loader`; a shard that cannot be read is named in the result and gets none.
        out: a folder for the indices, which readers find if SIMPLCLIP_INDEX names it; by default they lie beside the shards.
        decoded: decode each image, to find damage behind its header.
        workers: number of processes, by default one for each core; each reads a shard at a time.

    Returns: {"shards", "written", "samples" (their numbers), "broken" (a Skipped), "unreadable" (shard -> why)}.

    Raises: ValueError if shards match no file, a folder cannot be written to, or two shards of one name would share an index
    in `out`; FileExistsError if another process writes to a folder.
    """
    files = expand(shards)
    targets = {file: index.paths(file)[0] if out is None else Path(out, index.paths(file)[0].name) for file in files}
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    if len(set(targets.values())) < len(set(files)):
        raise InputError(f"out: expected shards of different names for one folder, got the same name twice for {str(out)!r}")
    unreadable: dict[str, str] = {}
    samples, broken = 0, Skipped()
    with processes(workers) as pool, contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(path.parent for path in targets.values()):
            if not os.access(folder, os.W_OK):
                raise InputError(f"out: expected a folder that can be written to, got {folder}; name another one (--out)")
            stack.enter_context(locked(folder, busy=f"expected a folder that no other process writes to, got {folder}"))
            remove_leftovers(folder, lambda name: name.endswith(index.SUFFIX))
        todo = [file for file in files if not _fits(file, targets[file], decoded)]
        with Progress("index", sum(map(os.path.getsize, todo)) >> 20, unit="MiB", shown=progress) as bar:
            ahead = 2 * (workers or cores())
            for file, found in ordered(lambda file: pool.submit(inspect_shard, file, decoded), todo, ahead):
                bar.update(os.path.getsize(file) >> 20)
                if isinstance(found, str):
                    unreadable[file] = found
                else:
                    index.write(targets[file], *found)
        for file in files:
            if file not in unreadable:
                try:
                    about = index.opened(file, targets[file]).about
                except Exception as error:  # as in _fits
                    unreadable[file] = f"shard {file!r} or its index changed while it was read: {error}"
                else:
                    samples += about["samples"]
                    broken.merge(skipped_of(about))
    written = sum(file not in unreadable for file in todo)
    return {"shards": len(files), "written": written, "samples": samples, "broken": broken, "unreadable": unreadable}


def _fits(file: str, path: Path, decoded: bool) -> bool:
    try:
        return index.opened(file, path).about["decoded"] >= decoded
    except Exception:  # the index is missing, stale, damaged or of another version
        return False


def skipped_of(about: dict[str, Any]) -> Skipped:
    skipped = Skipped()
    for reason, (count, first) in about["skipped"].items():
        skipped.counts[reason] += count
        skipped.examples[reason] = first
    return skipped


def inspect_shard(shard: str, decoded: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]] | str:
    """Reads a shard. Returns the `about` and `arrays` that `index.write` takes, or the reason why it cannot be read."""
    places, torn, damage = [], None, Skipped()
    try:
        identity = index.identity(shard)
        if not tar.is_compressed(shard):
            for place in tar.members(shard):
                places.append(place)
    except tar.ERRORS as error:
        torn = getattr(error, "strerror", None) or str(error)
        if not places:
            return f"shard {shard!r} cannot be opened: {torn}"
    try:
        about, arrays = described(read_shard(shard, damage, indexed=False), damage, decoded)
    except ShardError as error:
        return str(error)
    about |= {"shard": identity, "torn": torn}
    arrays |= {
        "names": index.joined([name for name, _ in places]),
        "offset": np.array([span.offset for _, span in places], np.int64),
        "size": np.array([span.size for _, span in places], np.int64),
    }
    return about, arrays


def described(
    samples: Iterable[Sample], damage: Skipped, decoded: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the part of `inspect_shard`'s result that depends on the samples alone. damage: the reader's counts.

    Raises ShardError.
    """
    broken = Skipped()
    rows = [_info(sample, decoded, broken) for sample in samples]
    damage.merge(broken)
    reasons = list(broken.counts)
    about = {
        "samples": len(rows),
        "formats": FORMATS,
        "reasons": reasons,
        "skipped": {reason: [count, damage.examples[reason]] for reason, count in damage.counts.items()},
        "decoded": decoded,
    }
    arrays = {
        "keys": index.joined([row.key for row in rows]),
        "width": np.array([row.width for row in rows], np.int32),
        "height": np.array([row.height for row in rows], np.int32),
        "format": np.array([row.format for row in rows], np.int32),
        "bytes": np.array([row.bytes for row in rows], np.int64),
        "broken": np.array([1 + reasons.index(row.broken) if row.broken else 0 for row in rows], np.int32),
        "captions": np.array([len(row.characters) for row in rows], np.int32),
        "characters": np.array([length for row in rows for length in row.characters], np.int32),
    }
    return about, arrays


def _info(sample: Sample, decoded: bool, skipped: Skipped) -> SampleInfo:
    """Returns a sample's part of an index; counts a broken sample in `skipped`. Raises ShardError for an unreadable shard."""
    image = image_of(sample)
    size = 0 if image is None else max(0, image.size) if isinstance(image, Span) else len(image)
    height = width = form = 0
    lengths, reason = [], ""
    try:
        check_sizes(sample)
        opened = parse(sample if decoded else {name: _start(value, image) for name, value in sample.items()})
        lengths = [len(caption) for caption in opened.captions]
        form = next((i for i, name in enumerate(FORMATS) if i and opened.encoded.startswith(MAGIC[name])), 0)
        height, width = _size(opened.encoded, image)
        if decoded:
            decode(opened.encoded)
    except BrokenSample as error:
        reason = error.args[0]
        if reason == UNREADABLE and not (isinstance(image, Span) and image.file != sample["__url__"]):
            raise ShardError(f"shard {sample['__url__']!r}: {error.args[1]}") from None
        skipped.add(reason, place_of(sample), error.args[1])
    return SampleInfo(sample["__key__"], width, height, form, size, lengths, reason)


def _start(value: Any, image: Any) -> Any:
    """Cuts the Span of the image to its first bytes; returns other values as they are."""
    return value._replace(size=min(value.size, HEAD)) if value is image and isinstance(value, Span) else value


def _size(encoded: bytes, image: bytes | Span | None) -> tuple[int, int]:
    """Reads height and width from the first bytes of an image, or from the whole image if its header is longer."""
    try:
        return size_of(encoded)
    except BrokenSample:
        if not isinstance(image, Span) or len(encoded) == image.size:
            raise
    return size_of(contents({"image": image, "__url__": image.file})["image"])
