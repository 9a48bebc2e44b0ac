"""`simplclip data pack`: makes the shards that training reads of a table, a JSON file or a folder.

    OUT/NAME-000000.tar ...   each sample's image as it is, and a json with its captions, label,
                              group and "source"
    OUT/meta.json             the source, and the samples and bytes of each shard and what was left
                              out of it

A shard has the samples of SAMPLES rows of the source. It gets its name when it is complete, so the
same command continues after a stop. The rows are read as a stream, and processes on every core read
the images and write the shards.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError, UserError
from simplclip.common.processes import cores, end_with_parent
from simplclip.common.progress import Progress, print_lines
from simplclip.data.decode_images import open_image, remarks_on
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.readers import is_source, open_source, split_of
from simplclip.data.rows import NO_OPTIONS, OPTION_NAMES, Options, PairRow, RowSource, is_address
from simplclip.data.samples import (
    MAX_BYTES,
    TEXT_BYTES,
    captions_of,
    file_bytes,
    record_of,
)
from simplclip.data.write_tars import TarFolder, add, entry_of, new_tar, skipped_in

FORMAT = "simplclip-shards-2"
SAMPLES = 1024  # rows of a shard


class PackError(UserError, RuntimeError):
    """A process that packs died."""


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options = NO_OPTIONS,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Writes shards of `source`, and meta.json, to the folder `out`; returns the shards' paths.

    Rows without a usable image and caption are left out, counted and named in meta.json; most
    images are opened, not decoded. Shards that an earlier run made of the same source are kept.
    Whether a table or JSON file is the same is told by its size and time, a folder by the names and
    texts in it.

    Args:
        source: a file that one of `readers.READERS` reads, FILE.json#SPLIT, or a folder of images:
            with captions beside them, with a table that names them, or with a folder for each
            class.
        options: of tables and JSON files.
        workers: processes, by default one for each core; a table that holds the image files is
            packed by one.
        progress: print lines.

    Raises: InputError (the source is none of these, no row is usable, `out` has other shards or
    files, the disk is full); FileExistsError (another process writes to `out`); PackError (a
    process died).
    """
    rows = open_source(source, options)
    about = {"name": rows.name, **rows.state()}
    folder = TarFolder(Path(os.path.expanduser(out)), {"format": FORMAT, "source": about})
    with folder.claimed():
        earlier = folder.complete and all(map(folder.is_whole, folder.entries))
        if not earlier:
            _write_missing_shards(rows, folder, workers or cores(), progress)
        shards = _shards_in(folder)
    if progress:
        _print_result(folder, rows.name, earlier)
    return shards


def _shards_in(folder: TarFolder) -> list[str]:
    """Returns the paths, in order of names, of tars that have samples by their entries."""
    names = [name for name, entry in sorted(folder.entries.items()) if entry["samples"]]
    return [str(folder.out / name) for name in names]


def _print_result(folder: TarFolder, source: str, earlier: bool) -> None:
    """Prints how many samples and shards the folder holds, what was left out, and remarks."""
    samples = sum(entry["samples"] for entry in folder.entries.values())
    shards = _shards_in(folder)
    shard_word = "shard" if len(shards) == 1 else "shards"
    result = (
        f"{samples:,} samples of {source} in {len(shards)} {shard_word}, {folder.out / '*.tar'}"
    )
    skipped = skipped_in(folder.entries.values())
    if earlier:
        print_lines(f"kept {result}, which an earlier run packed")
    elif skipped.counts:
        print_lines(f"packed {result}; {skipped}")
    else:
        print_lines(f"packed {result}")
    remarks = skipped_in(folder.entries.values(), "remarks")
    for remark, count in remarks.counts.items():
        example = f"such as {remarks.examples[remark]!r}; see Pixels in docs/data.md"
        print_lines(f"warning: {count:,} {remark}, {example}")


def pack_shards(data: Any, out: str | os.PathLike, *, progress: bool = True) -> Any:
    """Packs the tables, JSON files and folders in `data`; returns it with their shards in place.

    `pack` writes these shards to OUT/NAME, NAME from the source. In a list they are entries of that
    list; lists in lists become one. `data` itself is not changed.

    data: a path or address, a mapping with "shards", or a list of these, as `Loader` takes them. A
    mapping may also have the fields of `Options`, which are left out of the result. progress: print
    lines. Raises the errors of `pack`.
    """

    def packed_source(source: str | os.PathLike, folder: Path, options: Options) -> list[str]:
        return pack(source, folder, options, progress=progress)

    return _with_sources_replaced(data, Path(out), packed_source)


def _with_sources_replaced(
    data: Any, out: Path, replacement: Callable[[str | os.PathLike, Path, Options], Any]
) -> Any:
    """Returns `data` with `replacement(source, OUT/NAME, options)` in place of each source."""
    folders: set[str] = set()

    def new_folder(source: str | os.PathLike) -> Path:
        """Returns a folder OUT/NAME, or OUT/NAME-2 ..., that no other source of this call has."""
        stem = _stem(os.fspath(source))
        name = stem
        for number in itertools.count(2):
            if name not in folders:
                break
            name = f"{stem}-{number}"  # of another source with this name
        folders.add(name)
        return out / name

    def replace_sources(value: Any, options: Options = NO_OPTIONS) -> Any:
        """Returns `value`, a part of `data`, with its sources replaced."""
        if isinstance(value, Mapping):
            fields = {key: value[key] for key in OPTION_NAMES if value.get(key) is not None}
            rest = {key: value[key] for key in value if key not in OPTION_NAMES}
            return rest | {"shards": replace_sources(value.get("shards"), Options(**fields))}
        if isinstance(value, (list, tuple)):
            entries: list[Any] = []
            for entry in value:
                replaced = replace_sources(entry, options)
                if isinstance(replaced, list):  # shards: a config has no lists in lists
                    entries += replaced
                else:
                    entries.append(replaced)
            return entries
        if isinstance(value, (str, os.PathLike)) and is_source(value):
            return replacement(value, new_folder(value), options)
        return value

    return replace_sources(data)


def _write_missing_shards(
    source: RowSource, folder: TarFolder, workers: int, progress: bool
) -> None:
    """Writes the shards that the folder lacks. Raises InputError if no row is usable."""
    folder.complete = False
    folder.entries = {
        name: entry for name, entry in folder.entries.items() if folder.is_whole(name)
    }
    done = sum(entry.get("rows", 0) for entry in folder.entries.values())
    stem = _stem(source.path)

    def tasks() -> Iterator[tuple[Path, int, Iterable[PairRow]]]:
        """Yields the arguments of `_write_shard` for each SAMPLES rows whose tar is missing."""
        rows = source.rows()
        for first in itertools.count(step=SAMPLES):
            first_row = next(rows, None)
            if first_row is None:
                return
            shard_rows: Iterable[PairRow] = itertools.chain(
                [first_row], itertools.islice(rows, SAMPLES - 1)
            )
            if not source.embedded:
                shard_rows = list(shard_rows)
            name = f"{stem}-{first // SAMPLES:06d}.tar"
            if name not in folder.entries:
                yield folder.out / name, first, shard_rows
            deque(shard_rows, maxlen=0)  # those that were not written

    if source.embedded:  # other processes would get the images by way of memory
        workers = 1
    with Progress("pack", source.total, done, unit="rows", shown=progress) as bar:
        for (path, *_), entry in _mapped(_write_shard, tasks(), workers):
            folder.entries[path.name] = entry
            folder.save()
            bar.update(entry["rows"])
        if not any(entry["samples"] for entry in folder.entries.values()):
            (folder.out / "meta.json").unlink()
            with contextlib.suppress(OSError):  # it holds something else, such as .gitkeep
                folder.out.rmdir()
            left_out = skipped_in(folder.entries.values())
            raise InputError(
                "source: expected images with captions, got none that is usable in "
                f"{source.path!r}; {left_out}"
            )
    folder.complete = True
    folder.save()


def _write_shard(path: Path, first: int, rows: Iterable[PairRow]) -> dict[str, Any]:
    """Writes the tar of some rows, at least one, of the number `first` on; returns its entry."""
    skipped = Skipped()
    remarks = Skipped()
    samples = 0
    with new_tar(path) as tar:
        for number, row in enumerate(rows, first):
            try:
                files = files_of(row, remarks)
            except BrokenSample as broken:
                skipped.add(broken.reason, row.name, broken.detail)
                continue
            add(tar, f"{number:09d}", files)
            samples += 1
    if not samples:
        path.unlink()
    return entry_of(path, samples, skipped, remarks) | {"rows": number - first + 1}


def files_of(row: PairRow, remarks: Skipped | None = None) -> dict[str, bytes]:
    """Reads the image and texts of a row; returns {suffix: bytes}: the image as it is, and a json.

    The json has "captions", "source" (the row's name), and "label" and "group" if the row has them;
    a label is also the group. What is odd about the image is added to `remarks`, if not None.
    Raises BrokenSample.
    """
    if row.problem:
        raise BrokenSample(*row.problem)
    texts = {suffix: _read(path, TEXT_BYTES) for suffix, path in (row.texts or {}).items()}
    record = record_of(texts)
    captions = captions_of(texts, record if row.texts else {"captions": row.captions})
    image = _read(row.image, MAX_BYTES) if row.encoded is None else row.encoded
    if len(image) > MAX_BYTES:
        detail = f"{len(image):,} bytes, expected at most {MAX_BYTES:,}"
        raise BrokenSample("file too large", detail)
    opened = open_image(image)
    suffix = str(opened.format).lower().replace("jpeg", "jpg")
    if remarks is not None:
        for remark in remarks_on(opened, len(image)):
            remarks.add(remark, row.image or row.name)
    record |= {"captions": [" ".join(caption.split()) for caption in captions], "source": row.name}
    if row.group is not None:
        record["group"] = row.group
    if row.label is not None:
        record |= {"label": row.label, "group": row.label}
    return {suffix: image, "json": json.dumps(record).encode()}


def _read(path: str, limit: int) -> bytes:
    """Returns the bytes of a file, at most `limit`."""
    if not os.path.exists(path) and is_address(path):
        detail = f"{path!r}, which is not a path; of URLs img2dataset makes shards"
        raise BrokenSample("not a local file", detail)
    try:
        return file_bytes(path, limit)
    except FileNotFoundError:
        detail = f"{path!r} does not exist; try --images (in a config `images`)"
        raise BrokenSample("cannot be read", detail) from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise BrokenSample("cannot be read", error) from None


def _mapped(write: Callable, tasks: Iterator[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Yields (task, write(*task)) in order; raises PackError if one of the processes died."""
    if workers == 1:
        for task in tasks:
            yield task, write(*task)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
            while started := list(itertools.islice(tasks, 4 * workers)):
                yield from zip(started, pool.map(write, *zip(*started)))
    except BrokenProcessPool:
        raise PackError(
            "workers: a process died before its work was done (out of memory, the system kills "
            "processes); the same command goes on where it was"
        ) from None


def _stem(path: str) -> str:
    """Returns the name for shards of a source: its file name with _ for other characters."""
    name = os.path.basename(os.path.abspath(split_of(path)[0]))
    return re.sub(r"[^\w-]+", "_", os.path.splitext(name)[0]) or "data"
