"""`simplclip data pack`: makes shards of a table, a JSON file or a folder, which training then reads.

    OUT/NAME-000000.tar ...   each sample's image as it is, and a json with its captions, label, group and "source"
    OUT/meta.json             the source, the samples and bytes of each shard, what was left out, lengths of captions

A shard has the samples of SAMPLES rows of the source. It gets its name when it is complete, so the same command continues
after a stop. The rows are read as a stream, and processes on every core read the images and write the shards.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from simplclip.common.errors import InputError, UserError, visible
from simplclip.common.files import locked, remove_leftovers, write_atomically
from simplclip.common.progress import Progress
from simplclip.data import folders, tables
from simplclip.data.annotations import source as annotated
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.forms import JSON, TABLES, BadRow, Options, Row, Source, is_source, split_of
from simplclip.data.tar_writer import add, new_tar
from simplclip.data.text import TEXT_BYTES, captions_of, json_of, record_of

FORMAT = "simplclip-shards-1"
SAMPLES = 1024  # rows of a shard
MAX_BYTES = 256 << 20  # most bytes of an image
NOT_LOCAL = "not a local file"
_OPTIONS = tuple(Options.__dataclass_fields__)


class PackError(UserError, RuntimeError):
    """A process that packs died."""


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Makes shards of `source` in the folder `out`; returns their paths. Prints one line, unless `progress` is False.

    Rows without a usable image and caption are left out, counted and named in meta.json; an image is opened, not decoded.
    Shards that an earlier run made of the same source are kept. Whether a table or JSON file is the same is told by its size
    and time, a folder by the names in it.

    Args:
        source: a table (.csv, .tsv, .parquet), a JSON file, FILE.json#SPLIT, a folder of images with captions beside them, or
            one with a folder for each class.
        options: of tables and JSON files.
        workers: processes, by default one for each core.

    Raises: InputError (the source is none of these, no row is usable, `out` has other shards or files, the disk is full);
    FileExistsError (another process writes to `out`); PackError (a process died).
    """
    opened, out = open_source(source, options), Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, busy=f"out: expected a folder that no other process writes to, got {out}"):
        about = _earlier(out, opened)
        again = about["complete"]
        if not again:
            remove_leftovers(out, lambda name: True)
            _write(opened, out, about, workers or _cores(), progress)
    if progress:
        print(_line(about, opened.name, out, again))
    return _shards(about, out)


def packed(data: Any, out: str | os.PathLike, *, progress: bool = True) -> Any:
    """Returns `data` with shards in place of tables, JSON files and folders; `pack` makes these shards in OUT/NAME first.

    data: a path or address, a mapping with "shards", or a list of these, as `make_loader` takes them. A mapping may also have
        the fields of `Options`.
    """
    names: Counter[str] = Counter()

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
        names[name] += 1
        folder = name if names[name] == 1 else f"{name}-{names[name]}"  # of two files with one name, in their order
        return pack(part, Path(out) / folder, options, progress=progress)

    return replaced(data)


def summary(out: str | os.PathLike, examples: int = 3) -> str:
    """Describes the shards in `out`, in lines: lengths of captions, sizes of images, and some samples."""
    about = json.loads((Path(out) / "meta.json").read_text("utf-8"))
    samples = max(1, _samples(about))
    words, sides = (_spread(about[name]) for name in ("words", "sides"))
    size = sum(shard["bytes"] for shard in about["splits"]["data"]["shards"].values())
    lines = [
        f"captions  {sum(about['words'].values()) / samples:.1f} an image; words: median {words[0]}, of 19 in 20 at most "
        f"{words[1]}, of the longest {words[2]}",
        f"images    short side: median {sides[0]} pixels, of 19 in 20 at most {sides[1]}, of the largest {sides[2]}; "
        f"{size / samples / 1000:,.1f} kB a sample",
    ]
    with tarfile.open(_shards(about, Path(out))[0]) as tar:
        records = (json.loads(tar.extractfile(member).read()) for member in tar if member.name.endswith(".json"))
        for record in itertools.islice(records, examples):
            captions = " | ".join(record["captions"])
            lines.append(visible(f"  {record['source']}: {captions[:90]}{'...' * (len(captions) > 90)}"))
    return "\n".join(lines)


def open_source(path: str | os.PathLike, options: Options) -> Source:
    """Returns the rows of a table, a JSON file or a folder. Raises InputError if it is none, or lacks a column."""
    file, split = split_of(os.path.expanduser(os.fspath(path)))
    if split:
        options = Options(**{**vars(options), "split": split})
    if not os.path.exists(file):
        raise InputError(f"source: expected a table, a JSON file or a folder, got {file!r}, which does not exist")
    if os.path.isdir(file):
        return folders.source(file)
    kind = file.lower()
    if not kind.endswith((*TABLES, JSON)) or not os.path.isfile(file):
        expected = "a folder of images, or a file that ends in .csv, .tsv, .parquet or .json"
        hint = "; training reads tars as they are" if ".tar" in kind else ""
        raise InputError(f"source: expected {expected}, got {file!r}{hint}")
    read = annotated if kind.endswith(JSON) else tables.parquet if kind.endswith(".parquet") else tables.table
    return read(file, options)


def _write(source: Source, out: Path, about: dict[str, Any], workers: int, progress: bool) -> None:
    """Writes the shards that `about`, the meta.json, does not have, and adds them to it one after another."""
    shards = about["splits"]["data"]["shards"]
    stem = _stem(source.path)
    with Progress("pack", source.total, sum(shard["rows"] for shard in shards.values()), unit="rows", shown=progress) as bar:

        def tasks() -> Iterator[tuple[Path, int, list[Row | BadRow]]]:
            rows = source.rows()
            for number in itertools.count():
                some = list(itertools.islice(rows, SAMPLES))
                if not some:
                    return
                name = f"{stem}-{number:06d}.tar"
                if name not in shards:
                    yield out / name, number * SAMPLES, some

        for (path, _, rows), made in _mapped(_write_shard, tasks(), workers):
            shards[path.name] = {"samples": made["samples"], "bytes": made["bytes"], "rows": len(rows)}
            about["splits"]["data"]["samples"] += made["samples"]
            skipped = _skipped(about)
            skipped.merge(made["skipped"])
            about["skipped"] = {reason: [count, skipped.examples[reason]] for reason, count in skipped.counts.items()}
            for name in ("words", "sides"):
                about[name] = dict(sorted((Counter(about[name]) + made[name]).items()))
            if not _samples(about) and NOT_LOCAL in skipped.counts:
                break  # a table of URLs: all other rows are URLs too
            if _samples(about):
                _save(out, about)
            bar.update(len(rows))
        if not _samples(about):
            with contextlib.suppress(OSError):
                out.rmdir()
            raise InputError(
                f"source: expected images with captions, got none that is usable in {source.path!r}; {_skipped(about)}"
            )
    about["complete"] = True
    _save(out, about)


def _write_shard(path: Path, first: int, rows: list[Row | BadRow]) -> dict[str, Any]:
    """Writes one shard, if a row is usable. Keys are the numbers of rows, of which `first` is the first one's."""
    skipped, samples = Skipped(), 0
    words: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    with new_tar(path) as tar:
        for number, row in enumerate(rows, first):
            try:
                files, captions, side = _sample(row)
            except BrokenSample as broken:
                skipped.add(broken.args[0], row.name, broken.args[1])
                continue
            add(tar, f"{number:09d}", files)
            words.update(len(caption.split()) for caption in captions)
            sides[side] += 1
            samples += 1
    if not samples:
        path.unlink()
    size = path.stat().st_size if samples else 0
    return {"samples": samples, "bytes": size, "skipped": skipped, "words": words, "sides": sides}


def _sample(row: Row | BadRow) -> tuple[dict[str, bytes], list[str], int]:
    """Returns a sample's files by suffix, its captions, and the short side of its image. Raises BrokenSample."""
    if isinstance(row, BadRow):
        raise BrokenSample(row.reason, row.detail)
    texts = {suffix: _read(path, TEXT_BYTES) for suffix, path in row.texts.items()}
    record = record_of(texts)
    captions = captions_of(texts, record if row.texts else {"captions": row.captions})
    captions = [" ".join(caption.split()) for caption in captions]
    image = _read(row.image, MAX_BYTES)
    suffix, side = _kind(image)
    record |= {"captions": captions, "source": row.name}
    if row.label is not None:
        record |= {"label": row.label, "group": row.label}
    return {suffix: image, "json": json.dumps(record).encode()}, captions, side


def _read(path: str, limit: int) -> bytes:
    """Reads a file. Raises BrokenSample if it is no regular file (a named pipe or device may take for ever) or too large."""
    if not os.path.exists(path) and (path.startswith("pipe:") or "://" in path):
        raise BrokenSample(NOT_LOCAL, f"{path!r}, which is not a path; of URLs img2dataset makes shards")
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise BrokenSample("missing image", f"{path!r} is no file")
        if about.st_size <= limit:
            with open(path, "rb") as file:
                content = file.read(limit + 1)
            if len(content) <= limit:
                return content
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise BrokenSample("cannot be read", error) from None
    raise BrokenSample("file too large", f"{path!r} of {about.st_size:,} bytes, expected at most {limit:,}")


def _kind(image: bytes) -> tuple[str, int]:
    """Returns an image's suffix, by its content, and its short side, by its header. Raises BrokenSample."""
    plugin: Callable[[io.BytesIO], Image.Image]
    if image[:3] == b"\xff\xd8\xff":
        suffix, plugin = "jpg", JpegImagePlugin.JpegImageFile
    elif image[:8] == b"\x89PNG\r\n\x1a\n":
        suffix, plugin = "png", PngImagePlugin.PngImageFile
    elif image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        suffix, plugin = "webp", WebPImagePlugin.WebPImageFile
    else:
        raise BrokenSample("not an image", f"{len(image)} bytes that are not jpg, png or webp")
    try:
        return suffix, min(plugin(io.BytesIO(image)).size)
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None


def _mapped(write: Callable, tasks: Iterator[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """Yields each task with write(*task), in order, done by `workers` processes; in this one if there is a single task."""
    first = list(itertools.islice(tasks, 2))
    if workers == 1 or len(first) < 2:
        for task in itertools.chain(first, tasks):
            yield task, write(*task)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    tasks = itertools.chain(first, tasks)
    try:
        with ProcessPoolExecutor(workers, context, _start) as pool:
            while some := list(itertools.islice(tasks, 4 * workers)):
                yield from zip(some, pool.map(write, *zip(*some)))
    except BrokenProcessPool:
        raise PackError(
            "workers: a process died before its work was done (out of memory, the system kills processes); "
            "the same command goes on where it was"
        ) from None


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the pool ends when the parent has ended it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent, even if that is killed


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _earlier(out: Path, source: Source) -> dict[str, Any]:
    """Returns the meta.json of an earlier run of the same source, a new one for a new folder or if a shard is gone."""
    state = {"name": source.name, **source.state}
    new = {"format": FORMAT, "source": state, "complete": False, "skipped": {}, "words": {}, "sides": {}}
    new["splits"] = {"data": {"samples": 0, "shards": {}}}
    entries = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if "meta.json" not in entries:
        if strangers := [name for name in entries if not re.fullmatch(re.escape(_stem(source.path)) + r"-\d{6,}\.tar", name)]:
            raise InputError(f"out: expected a new folder, got {out}, which holds other files ({sorted(strangers)[0]})")
        return new
    try:
        about = json_of((out / "meta.json").read_text("utf-8"))
        if about["source"] != state:
            raise ValueError("those of another source, of other options, or from before a change of the source")
        about["words"], about["sides"] = ({int(n): count for n, count in about[name].items()} for name in ("words", "sides"))
        shards = about["splits"]["data"]["shards"]
        whole = all((out / name).stat().st_size == entry["bytes"] for name, entry in shards.items() if entry["samples"])
    except FileNotFoundError:
        whole = False
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"out: expected {out} to hold the shards of {source.path!r}, got {error}; remove it or choose another folder"
        ) from None
    return about if whole else new


def _save(out: Path, about: dict[str, Any]) -> None:
    write_atomically(out / "meta.json", json.dumps(about, indent=1) + "\n")


def _samples(about: dict[str, Any]) -> int:
    return about["splits"]["data"]["samples"]


def _shards(about: dict[str, Any], out: Path) -> list[str]:
    return [str(out / name) for name, entry in sorted(about["splits"]["data"]["shards"].items()) if entry["samples"]]


def _skipped(about: dict[str, Any]) -> Skipped:
    entries = about["skipped"].items()
    return Skipped(
        Counter({reason: count for reason, (count, _) in entries}), {reason: first for reason, (_, first) in entries}
    )


def _line(about: dict[str, Any], source: str, out: Path, again: bool) -> str:
    shards = len(_shards(about, out))
    made = f"{_samples(about):,} samples of {source} in {shards} shard{'s' * (shards > 1)}, {out / '*.tar'}"
    skipped = f"; {_skipped(about)}" if about["skipped"] else ""
    return f"kept {made}, which an earlier run packed" if again else f"packed {made}{skipped}"


def _spread(counts: Mapping[Any, int]) -> tuple[int, int, int]:
    """Returns the median of counted numbers, the number that 19 of 20 do not exceed, and the largest."""
    numbers = sorted((int(number), count) for number, count in counts.items())
    total, values = sum(count for _, count in numbers), []
    for share in (0.5, 0.95):
        below = itertools.accumulate(count for _, count in numbers)
        values.append(next(number for (number, _), reached in zip(numbers, below) if reached >= share * total))
    return values[0], values[1], numbers[-1][0]


def _stem(path: str) -> str:
    name = os.path.basename(os.path.abspath(path.partition("#")[0] if not os.path.exists(path) else path))
    return re.sub(r"[^\w-]+", "_", os.path.splitext(name)[0]) or "data"
