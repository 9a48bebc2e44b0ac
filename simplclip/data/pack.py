"""`simplclip data pack`: makes shards of a table, a JSON file or a folder, which training then
reads.

    OUT/NAME-000000.tar ...   each sample's image as it is, and a json with its captions, label,
                              group and "source"; with a share that is held out in
                              OUT/train-000000.tar ... and OUT/held-000000.tar ...
    OUT/meta.json             the source, and the samples and bytes of each shard and what was left
                              out of it

A shard has the samples of SAMPLES rows of the source. It gets its name when it is complete, so the
same command continues after a stop. The rows are read as a stream, and processes on every core read
the images and write the shards.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from simplclip.common.errors import InputError, UserError, visible
from simplclip.common.progress import Progress
from simplclip.data.decode_images import open_image, remarks_on
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.read_tables import Options, Row, RowSource, is_source, open_source, split_of
from simplclip.data.samples import (
    MAX_BYTES,
    TEXT_BYTES,
    captions_of,
    file_bytes,
    is_held_out,
    record_of,
)
from simplclip.data.write_tars import TarFolder, add, entry_of, new_tar, skipped_in

FORMAT = "simplclip-shards-2"
SAMPLES = 1024  # rows of a shard
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # of Pillow's formats
_OPTIONS = tuple(Options.__dataclass_fields__)


class PackError(UserError, RuntimeError):
    """A process that packs died."""


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    *,
    hold_out: float = 0.0,
    workers: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Makes shards of `source` in the folder `out`; returns their paths.

    Prints lines, unless `progress` is False.

    Rows without a usable image and caption are left out, counted and named in meta.json; most
    images are opened, not decoded. Shards that an earlier run made of the same source are kept.
    Whether a table or JSON file is the same is told by its size and time, a folder by the names and
    texts in it.

    Args:
        source: a table (.csv, .tsv, .parquet), a JSON file, FILE.json#SPLIT, a folder of images
            with captions beside them, or one with a folder for each class.
        options: of tables and JSON files.
        hold_out: share of the samples that gets shards held-*.tar, beside train-*.tar; by the hash
            of the json's group, else of the image's place in the source, so that more images change
            no sample's side.
        workers: processes, by default one for each core.

    Raises: InputError (the source is none of these, no row is usable, `out` has other shards or
    files, the disk is full); FileExistsError (another process writes to `out`); PackError (a
    process died).
    """
    opened, out = open_source(source, options), Path(out).expanduser()
    about = {"name": opened.name, **opened.state()} | ({"hold_out": hold_out} if hold_out else {})
    folder = TarFolder(out, {"format": FORMAT, "source": about})
    with folder.claimed():
        again = folder.complete and all(map(folder.is_whole, folder.entries))
        if not again:
            _write(opened, folder, hold_out, workers or _cores(), progress)
        shards = [
            str(out / shard) for shard, entry in sorted(folder.entries.items()) if entry["samples"]
        ]
    if progress:
        samples = sum(entry["samples"] for entry in folder.entries.values())
        made = (
            f"{samples:,} samples of {opened.name} in {len(shards)} "
            f"shard{'s' * (len(shards) > 1)}, {out / '*.tar'}"
        )
        if hold_out:
            held = sum(
                entry["samples"]
                for name, entry in folder.entries.items()
                if name.startswith("held-")
            )
            made += f", of which {held:,} are held out in {out / 'held-*.tar'}"
        skipped = skipped_in(folder.entries.values())
        left_out = f"; {skipped}" if skipped.counts else ""
        print(f"kept {made}, which an earlier run packed" if again else f"packed {made}{left_out}")
        remarks = skipped_in(folder.entries.values(), "remarks")
        for remark, count in remarks.counts.items():
            print(
                f"{count:,} {remark}, such as {remarks.examples[remark]!r}; see Pixels in "
                "docs/data.md"
            )
    return shards


def packed(data: Any, out: str | os.PathLike, *, progress: bool = True) -> Any:
    """Returns `data` with shards in place of tables, JSON files and folders; `pack` makes these
    shards in OUT/NAME first.

    data: a path or address, a mapping with "shards", or a list of these, as `Loader` takes them. A
    mapping may also have
        the fields of `Options`.
    """
    folders: set[str] = set()

    def replaced(part: Any, options: Options = Options()) -> Any:  # noqa: B008
        if isinstance(part, Mapping):
            given = {key: part[key] for key in _OPTIONS if part.get(key) is not None}
            rest = {key: value for key, value in part.items() if key not in _OPTIONS}
            return rest | {"shards": replaced(part.get("shards"), Options(**given))}
        if isinstance(part, (list, tuple)):
            return [replaced(one, options) for one in part]
        if not (isinstance(part, (str, os.PathLike)) and is_source(part)):
            return part
        name = _stem(os.fspath(part))
        # of files with one name
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        folder = next(candidate for candidate in names if candidate not in folders)
        folders.add(folder)
        return pack(part, Path(out) / folder, options, progress=progress)

    return replaced(data)


def summary(shards: list[str], examples: int = 3) -> str:
    """Describes shards that `pack` made, in lines: lengths of captions, sizes of images, and some
    samples.

    The lengths and sizes are those of the first, the middle and the last shard.
    """
    shards = list(dict.fromkeys((shards[0], shards[len(shards) // 2], shards[-1])))
    records, sides = [], []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    records.append(json.loads(content))
                else:
                    sides.append(min(open_image(content).size))
    captions = [caption for record in records for caption in record["captions"]]
    words, pixels = (
        "median {}, 95 % up to {}, at most {}".format(
            *np.quantile(numbers, (0.5, 0.95, 1), method="higher")
        )
        for numbers in ([len(caption.split()) for caption in captions], sides)
    )
    kilobytes = sum(map(os.path.getsize, shards)) / len(records) / 1000
    lines = [
        f"captions  {len(captions) / len(records):.1f} an image; words: {words}",
        f"images    pixels of the short side: {pixels}; {kilobytes:,.1f} kB a sample",
    ]
    for record in records[:examples]:
        text = " | ".join(record["captions"])
        lines.append(visible(f"  {record['source']}: {text[:90]}{'...' * (len(text) > 90)}"))
    return "\n".join(lines)


def _write(
    source: RowSource, folder: TarFolder, hold_out: float, workers: int, progress: bool
) -> None:
    """Writes the shards that the folder does not have, and adds their entries one after another."""
    folder.complete = False
    folder.entries = {
        name: entry for name, entry in folder.entries.items() if folder.is_whole(name)
    }
    done = sum(entry.get("rows", 0) for entry in folder.entries.values())
    stems = ("train", "held") if hold_out else (_stem(source.path),)

    def tasks() -> Iterator[tuple[list[Path], int, list[Row], float]]:
        rows = source.rows()
        for first in itertools.count(step=SAMPLES):
            of_shard = list(itertools.islice(rows, SAMPLES))
            if not of_shard:
                return
            names = [f"{stem}-{first // SAMPLES:06d}.tar" for stem in stems]
            if not folder.entries.keys() >= {*names}:
                yield [folder.out / name for name in names], first, of_shard, hold_out

    with Progress("pack", source.total, done, unit="rows", shown=progress) as bar:
        for (_, _, rows, _), entries in _mapped(_write_shard, tasks(), workers):
            folder.entries |= entries
            folder.save()
            bar.update(len(rows))
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


def _write_shard(
    paths: list[Path], first: int, rows: list[Row], hold_out: float
) -> dict[str, dict[str, Any]]:
    """Writes the shard of some rows, or two of which the second has what is held out; returns their
    entries by name.

    A shard without samples is not written. Keys are the numbers of rows, of which `first` is the
    first.
    """
    skipped = Skipped()
    remarks = Skipped()
    samples = [0 for _ in paths]
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(new_tar(path)) for path in paths]
        for number, row in enumerate(rows, first):
            try:
                files = files_of(row, remarks)
            except BrokenSample as broken:
                skipped.add(broken.reason, row.name, broken.detail)
                continue
            side = is_held_out(files | {"__shard__": "", "__key__": row.name}, hold_out)
            add(shards[side], f"{number:09d}", files)
            samples[side] += 1
    counted = {"rows": len(rows)}
    entries = {}
    for path, count in zip(paths, samples):
        if not count:
            path.unlink()
        entries[path.name] = entry_of(path, count, skipped, remarks) | counted
        # once, with the first of the two
        skipped = Skipped()
        remarks = Skipped()
        counted = {}
    return entries


def files_of(row: Row, remarks: Skipped | None = None) -> dict[str, bytes]:
    """Returns a sample's files by suffix: the image as it is, and a json.

    Raises BrokenSample. Adds to `remarks`.
    """
    if row.problem:
        raise BrokenSample(*row.problem)
    texts = {suffix: _read(path, TEXT_BYTES) for suffix, path in row.texts.items()}
    record = record_of(texts)
    captions = captions_of(texts, record if row.texts else {"captions": row.captions})
    image = _read(row.image, MAX_BYTES)
    opened = open_image(image)
    suffix = SUFFIX[opened.format]
    if remarks is not None:
        for remark in remarks_on(opened, len(image)):
            remarks.add(remark, row.image)
    record |= {"captions": [" ".join(caption.split()) for caption in captions], "source": row.name}
    if row.label is not None:
        record |= {"label": row.label, "group": row.label}
    return {suffix: image, "json": json.dumps(record).encode()}


def _read(path: str, limit: int) -> bytes:
    if not os.path.exists(path) and (path.startswith("pipe:") or "://" in path):
        raise BrokenSample(
            "not a local file", f"{path!r}, which is not a path; of URLs img2dataset makes shards"
        )
    try:
        return file_bytes(path, limit)
    except FileNotFoundError:
        raise BrokenSample(
            "cannot be read", f"{path!r} does not exist; try --images (in a config `images`)"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise BrokenSample("cannot be read", error) from None


def _mapped(write: Callable, tasks: Iterator[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Yields each task with write(*task), in order, done by `workers` processes."""
    if workers == 1:
        yield from ((task, write(*task)) for task in tasks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start) as pool:
            while started := list(itertools.islice(tasks, 4 * workers)):
                yield from zip(started, pool.map(write, *zip(*started)))
    except BrokenProcessPool:
        raise PackError(
            "workers: a process died before its work was done (out of memory, the system kills "
            "processes); the same command goes on where it was"
        ) from None


def _start() -> None:
    # Ctrl-C reaches the whole group; the pool ends when the parent has ended it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: it ends with its parent, even if that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stem(path: str) -> str:
    name = os.path.basename(os.path.abspath(split_of(path)[0]))
    return re.sub(r"[^\w-]+", "_", os.path.splitext(name)[0]) or "data"
