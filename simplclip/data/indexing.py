"""`simplclip data index`: makes the index files of shards; simplclip/data/index.py says what is in them."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from itertools import islice, zip_longest
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
from simplclip.data.pool import cores, processes
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


class Row(NamedTuple):
    """What is known of a sample."""

    key: str
    width: int
    height: int
    format: int
    bytes: int
    characters: list[int]
    tokens: list[int]
    broken: tuple[str, str, str] | None  # reason, place and detail


class Found(NamedTuple):
    """What one process found in its share of a shard."""

    rows: list[Row]
    damage: Skipped
    members: list[tuple[str, Span]]
    torn: str | None
    shard: dict[str, Any]  # its identity before it was read
    decoded: bool
    tokens: bool


def run(
    shards: Shards,
    *,
    out: str | os.PathLike | None = None,
    decoded: bool = False,
    tokens: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the index of each shard that has none, or one that does not fit it or lacks what is asked for.

    Args:
        shards: as for `make_loader`; a shard that cannot be read is named in the result and gets none.
        out: a folder for the indices, which readers find if SIMPLCLIP_INDEX names it; by default they lie beside the shards.
        decoded: decode each image, to find damage behind its header.
        tokens: count the tokens of each caption by CLIP's tokenizer.
        workers: number of processes, by default one for each core.

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
        todo = [file for file in files if not _fits(file, targets[file], decoded, tokens)]
        total = sum(map(os.path.getsize, todo))
        with Progress("index", total >> 20, unit="MiB", shown=progress) as bar:
            for file, found in _found(pool, todo, decoded, tokens, workers or cores()):
                bar.update(os.path.getsize(file) >> 20)
                if isinstance(found, str):
                    unreadable[file] = found
                else:
                    index.write(targets[file], *tables(found))
        for file in files:
            if file not in unreadable:
                try:
                    about = index.opened(file, targets[file]).about
                except (OSError, ValueError) as error:
                    unreadable[file] = f"shard {file!r} changed while it was read: {error}"
                else:
                    samples += about["samples"]
                    broken.merge(skipped_of(about))
    return {
        "shards": len(files),
        "written": len(todo) - len(unreadable),
        "samples": samples,
        "broken": broken,
        "unreadable": unreadable,
    }


def skipped_of(about: dict[str, Any]) -> Skipped:
    skipped = Skipped()
    for reason, (count, first) in about["skipped"].items():
        skipped.counts[reason] += count
        skipped.examples[reason] = first
    return skipped


def _fits(file: str, path: Path, decoded: bool, tokens: bool) -> bool:
    try:
        about = index.opened(file, path).about
    except Exception:  # there is none, or it is another version's, stale or damaged
        return False
    return about["decoded"] >= decoded and about["tokens"] >= tokens


def _found(pool: Any, files: list[str], decoded: bool, tokens: bool, workers: int) -> Iterator[tuple[str, Any]]:
    """Each shard with what is found in it, or the reason why it cannot be read; the shards come as they are finished."""
    # With few shards several processes share one: each reads all headers, and looks at its share of the samples.
    shares = max(1, math.ceil(2 * workers / max(1, len(files)))) if workers > 1 else 1
    waiting = iter([(file, share) for file in files for share in range(shares)])
    left: dict[str, dict[int, Any]] = {}
    running: dict[Any, tuple[str, int]] = {}
    while True:
        for file, share in islice(waiting, 2 * workers - len(running)):
            running[pool.submit(look, file, share, shares, decoded, tokens)] = file, share
        if not running:
            return
        future = next(as_completed(running))
        file, share = running.pop(future)
        parts = left.setdefault(file, {})
        try:
            parts[share] = future.result()
        except ShardError as error:
            parts[share] = str(error)
        if len(parts) == shares:
            parts = [part for _, part in sorted(left.pop(file).items())]
            failed = [part for part in parts if isinstance(part, str)]
            yield file, failed[0] if failed else _joined(parts)


def _joined(parts: list[Found]) -> Found:
    rows = [row for rows in zip_longest(*(part.rows for part in parts)) for row in rows if row is not None]
    return parts[0]._replace(rows=rows)


def look(shard: str, share: int = 0, shares: int = 1, decoded: bool = False, tokens: bool = False) -> Found:
    """A share of the samples of a shard, as its files are now. Raises ShardError if it cannot be opened."""
    damage, found, torn = Skipped(), [], None
    try:
        identity = index.identity(shard)
        if not tar.is_compressed(shard) and not share:
            for member in tar.members(shard):
                found.append(member)
    except tar.ERRORS as error:
        torn = getattr(error, "strerror", None) or str(error)
        if not found:
            raise ShardError(f"shard {shard!r} cannot be opened: {torn}") from error
    samples = islice(read_shard(shard, damage, indexed=False), share, None, shares)
    rows = [_row(sample, decoded, tokens) for sample in samples]
    return Found(rows, damage, found, torn, identity, decoded, tokens)


def _row(sample: Sample, decoded: bool, tokens: bool) -> Row:
    image = image_of(sample)
    size = 0 if image is None else max(0, image.size) if isinstance(image, Span) else len(image)
    height = width = form = 0
    lengths, counted, broken = [], [], None
    try:
        check_sizes(sample)
        opened = parse(sample if decoded else {name: _start(value, image) for name, value in sample.items()})
        lengths = [len(caption) for caption in opened.captions]
        counted = [_tokens(caption) for caption in opened.captions] if tokens else []
        form = next((i for i, name in enumerate(FORMATS) if i and opened.encoded.startswith(MAGIC[name])), 0)
        height, width = _size(opened.encoded, image)
        if decoded:
            decode(opened.encoded)
    except BrokenSample as error:
        if error.args[0] == UNREADABLE:
            raise ShardError(f"shard {sample['__url__']!r}: {error.args[1]}") from None
        broken = error.args[0], place_of(sample), str(error.args[1])
    return Row(sample["__key__"], width, height, form, size, lengths, counted, broken)


def _start(value: Any, image: Any) -> Any:
    return value._replace(size=min(value.size, HEAD)) if value is image and isinstance(value, Span) else value


def _size(encoded: bytes, image: bytes | Span) -> tuple[int, int]:
    try:
        return size_of(encoded)
    except BrokenSample:
        if not isinstance(image, Span) or len(encoded) == image.size:
            raise
    return size_of(contents({"image": image, "__url__": image.file})["image"])


@functools.cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _tokens(caption: str) -> int:
    return len(_tokenizer().encode(caption)) + 2


def tables(found: Found) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `index.write` takes."""
    rows, skipped = found.rows, Skipped()
    skipped.merge(found.damage)
    for row in rows:
        if row.broken:
            skipped.add(*row.broken)
    reasons = list(dict.fromkeys(row.broken[0] for row in rows if row.broken))
    about = {
        "shard": found.shard,
        "samples": len(rows),
        "torn": found.torn,
        "formats": FORMATS,
        "reasons": reasons,
        "skipped": {reason: [count, skipped.examples[reason]] for reason, count in skipped.counts.items()},
        "decoded": found.decoded,
        "tokens": found.tokens,
    }
    arrays = {
        "names": index.joined([name for name, _ in found.members]),
        "offset": np.array([span.offset for _, span in found.members], np.int64),
        "size": np.array([span.size for _, span in found.members], np.int64),
        "keys": index.joined([row.key for row in rows]),
        "width": np.array([row.width for row in rows], np.int32),
        "height": np.array([row.height for row in rows], np.int32),
        "format": np.array([row.format for row in rows], np.int32),
        "bytes": np.array([row.bytes for row in rows], np.int64),
        "broken": np.array([1 + reasons.index(row.broken[0]) if row.broken else 0 for row in rows], np.int32),
        "captions": np.array([len(row.characters) for row in rows], np.int32),
        "characters": np.array([length for row in rows for length in row.characters], np.int32),
    }
    if found.tokens:
        arrays["tokens"] = np.array([length for row in rows for length in row.tokens], np.int32)
    return about, arrays
