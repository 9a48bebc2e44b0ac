"""Makes new shards from shards: sidecars, which hold only the new files that a function makes for the samples, e.g. a
teacher's features; or copies of the samples that also have the new files, e.g. smaller images.

The new folder has only complete shards at any moment: a shard gets its name after all of it is on disk. After a crash the
same command continues with the first unfinished shard, and the result has the same bytes.

    OUT/<name>.tar        the samples of the shard of that name, in the same order, or only their new files
    OUT/meta.json         how they were made; "splits" with the samples, bytes and sha256 of each finished shard
    OUT/LICENSES.md       the file of that name in the input folder, if there is one
"""

import contextlib
import errno
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import differences, identity, locked, remove_leftovers, replacing, temporary_of, write_atomically
from simplclip.common.progress import Progress
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.pairs import expand
from simplclip.data.pool import ordered
from simplclip.data.shards import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    Pair,
    Sample,
    ShardError,
    Shards,
    check_count,
    contents,
    count_samples,
    folders_of,
    place_of,
    read_shard,
    usable,
)
from simplclip.data.sidecars import Folders, beside, joined, plain_name
from simplclip.data.sidecars import check as check_sidecars
from simplclip.data.tar import MAX_BYTES

FORMAT = "simplclip-shards-1"
SIDECARS = "simplclip-sidecars-1"
_IMAGE_OR_TEXT = {*IMAGE_SUFFIXES, "txt", "json"}  # the files of a key count as a sample if one has such a suffix

# The results for some samples: for each its new files by suffix, None for a file to drop; or the reason why it is broken.
Made = Sequence[Mapping[str, bytes | None] | BrokenSample]
Process = Callable[[list[Pair]], Made | Future[Made]]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Making:
    """How the shards of one run are made; `rewrite` documents the fields."""

    process: Process
    batch_size: int
    workers: int
    sidecar: bool
    sidecars: Folders
    max_bytes: int
    advance: Callable[[int], None]  # called with the number of samples that are written


def rewrite(
    shards: Shards,
    out: str | PathLike,
    process: Process,
    *,
    stamp: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    progress: bool = True,
    title: str = "samples",
    workers: int = 0,
    sidecar: bool = False,
    sidecars: Folders = (),
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """Writes the samples of `shards` to shards of the same names in the folder `out`, with the files that `process` makes.

    All files of a sample are kept (suffixes in lower case); files from `process` replace those of the same suffix or are
    added after them. Files without a suffix belong to no sample and are left out. Broken samples are copied without
    processing and counted by reason; of a damaged tar the samples before the damage are kept, and the damage is counted. The
    bytes of a shard depend only on its input, on `process` and on `batch_size`; .gz, .xz or .bz2 is removed from its name.

    Finished shards of an earlier run are kept, unless their input has changed. A second command may add other shards of the
    same folder. Keys of the input folder's meta.json, e.g. the stamp of a teacher, are copied. Memory: one batch.

    Ranks divide the shards, and the first one writes meta.json.

    With `sidecar` only the files from `process` are written, of samples that are not broken, and nothing of the input's
    meta.json; `simplclip.data.sidecars` joins them while reading.

    Args:
        out: a new folder, or that of an earlier run with the same `stamp`.
        process: maps at most `batch_size` samples of one shard to {suffix: bytes} for each. None in place of bytes drops a
            file; a BrokenSample in place of the dict counts the sample as broken. An exception of `process` ends the run.
        stamp: keys of meta.json that describe how the new files were made, e.g. {"teacher": {"name": ...}}; JSON types only.
        progress, title: whether the progress and the notes are shown, and what the progress is called.
        workers: more than 0 if `process` only submits its work to an executor with so many workers and returns the Future.
            The images of samples are then not decoded first, and up to twice as many batches are in progress at a time.
        sidecars: folders of sidecars that are joined to the samples first, e.g. with other captions; needs `sidecar`.
        max_bytes: a sample whose files have more bytes together is left out and counted.

    Returns: {"path", "shards" (their number), "sources" (name -> input), "written" (by this run), "samples", "skipped" (a
    Skipped), "notes"}.

    Raises: ValueError if two shards have one file name, `out` is the folder of an input, input folders have different
    meta.json, or an earlier run had another stamp; FileExistsError if `out` holds other files or another process writes to
    it; ShardError if a shard cannot be opened; InputError if the disk is full.
    """
    check_count("batch_size", batch_size, 1)
    out = Path(out).expanduser()
    sources = _named(expand(shards), out)
    check_sidecars(sources.values(), sidecars)
    folders = folders_of(sources.values())
    meta = {"format": SIDECARS if sidecar else FORMAT}
    meta |= {} if sidecar else _carried(folders, {*stamp})
    meta |= json.loads(json.dumps(dict(stamp)))
    with contextlib.ExitStack() as stack:
        finished = ranks.on_first(lambda: stack.enter_context(_claimed(out, meta, folders)))
        todo = ranks.on_first(lambda: _unfinished(sources, out, finished, sidecars))
        kept = sum(finished[name]["samples"] for name in sources if name not in todo)
        left = count_samples(list(todo.values()))
        total = None if left is None else kept + sum(left)
        with Progress(title, total, kept, shown=progress) as bar:
            making = Making(process, batch_size, workers, sidecar, sidecars, max_bytes, bar.update)

            def write(name: str) -> tuple[str, int, dict[str, Any]]:
                return name, ranks.number(), _write_shard(todo[name], out / name, making)

            for name, rank, entry in ranks.mapped(write, todo):
                finished[name] = entry
                _write_meta(out, meta, finished)
                bar.update(entry["samples"] if rank else 0)
        finished = ranks.on_first(lambda: finished)
    skipped = Skipped()
    for name in sources:
        for reason, (count, first) in finished[name].get("skipped", {}).items():
            skipped.merge(Skipped(Counter({reason: count}), {reason: first}))
    notes = []
    if len(todo) < len(sources):
        notes.append(f"{len(sources) - len(todo)} of {len(sources)} shards in {out} were finished earlier and are kept.")
    if skipped.counts:
        notes.append(f"{'Left out' if sidecar else 'Copied without processing'}, or lost by damage: {skipped}")
    for note in notes if progress and ranks.first() else ():
        print(note)
    return {
        "path": str(out),
        "shards": len(sources),
        "sources": sources,
        "written": len(todo),
        "samples": sum(finished[name]["samples"] for name in sources),
        "skipped": skipped,
        "notes": notes,
    }


def _named(files: list[str], out: Path) -> dict[str, str]:
    """Returns the input of each new shard by the new shard's name."""
    sources: dict[str, str] = {}
    for file in files:
        if out.resolve() in (Path(file).resolve().parent, Path(file).parent.resolve()):
            raise InputError(f"out: expected another folder than that of the input {file!r}, got {str(out)!r}")
        name = plain_name(file)
        if name in sources:
            raise InputError(f"shards: expected files of different names, got {sources[name]!r} and {file!r}")
        sources[name] = file
    return sources


def _carried(folders: list[str], without: set[str]) -> dict[str, Any]:
    """Returns the keys of the input folders' meta.json that are still valid for rewritten samples."""
    found = []
    for folder in folders:
        path = Path(folder, "meta.json")
        meta = _read_json(path) if path.is_file() else {}
        found.append({key: value for key, value in meta.items() if key not in without | {"format", "splits"}})
        if changed := differences(found[0], found[-1]):
            raise InputError(
                f"shards: expected folders with the same meta.json, got different {next(iter(changed))!r} in "
                f"{folders[0] or '.'!r} and {folder or '.'!r}; rewrite them one at a time, into different folders"
            )
    return found[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text("utf-8"))
        if not isinstance(meta, dict):
            raise InputError(f"expected an object, got {type(meta).__name__}")
        return meta
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


@contextlib.contextmanager
def _claimed(out: Path, meta: dict[str, Any], folders: list[str]) -> Iterator[dict[str, Any]]:
    """Context that makes or takes over the folder and locks it for this process; gives the finished shards by name."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, busy=f"out: expected a folder that no other process writes to, got {out}"):
        names = {path.name for path in out.iterdir()}
        finished: dict[str, Any] = {}
        if "meta.json" in names:
            former = _read_json(out / "meta.json")
            if former.get("format") != meta["format"]:
                raise FileExistsError(f"out: expected a new folder or an earlier run's, got {out} with another meta.json")
            for split in former.pop("splits", {}).values():
                finished |= split["shards"]
            if changed := differences(former, meta):
                changes = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise InputError(
                    f"out: expected the settings of the earlier run in {out}, got others: {changes}; choose another folder"
                )
        elif strangers := sorted(name for name in names if temporary_of(name) != "meta.json"):
            raise FileExistsError(
                f"out: expected a new folder or that of an earlier run, got {out}, which holds other files ({strangers[0]})"
            )
        else:
            _write_meta(out, meta, finished)
        remove_leftovers(out, lambda name: True)
        licenses = [path for folder in folders if (path := Path(folder, "LICENSES.md")).is_file()]
        if licenses and "LICENSES.md" not in names:
            write_atomically(out / "LICENSES.md", b"\n".join(dict.fromkeys(path.read_bytes() for path in licenses)))
        yield finished


def _write_meta(out: Path, meta: dict[str, Any], finished: dict[str, Any]) -> None:
    splits: dict[str, Any] = {}
    for name, entry in sorted(finished.items()):
        split = splits.setdefault(re.split(r"[-_.]?\d|\.tar", name)[0] or "data", {"samples": 0, "shards": {}})
        split["samples"] += entry["samples"]
        split["shards"][name] = entry
    write_atomically(out / "meta.json", json.dumps(meta | {"splits": splits}, indent=1) + "\n")


def _unfinished(sources: dict[str, str], out: Path, finished: dict[str, Any], sidecars: Folders) -> dict[str, str]:
    todo = {}
    for name, source in sources.items():
        entry, shard = finished.get(name, {}), out / name
        whole = shard.is_file() and shard.stat().st_size == entry.get("bytes")
        if not whole or not _origin(source, sidecars).items() <= entry.items():
            todo[name] = source
    return todo


def _origin(source: str, sidecars: Folders) -> dict[str, Any]:
    """Returns the part of a shard's entry in meta.json that says from which files the shard was made."""
    joined = {"sidecars": [identity(path) for path in beside(source, sidecars)]} if sidecars else {}
    return {"source": identity(source), **joined}


def _write_shard(source: str, target: Path, making: Making) -> dict[str, Any]:
    """Writes one shard; returns its entry of meta.json."""
    skipped, count = Skipped(), 0

    def batches() -> Iterator[tuple[list[Sample], list[Pair]]]:
        samples = read_shard(source, skipped, every=not making.sidecar, ahead=True, max_bytes=making.max_bytes)
        samples = joined(samples, source, making.sidecars, skipped) if making.sidecar else samples
        whole = _whole(samples, skipped, making.max_bytes)
        while batch := list(islice(whole, making.batch_size)):
            use = {"use": lambda opened: None} if making.workers else {}
            yield batch, list(usable(batch, skipped, **use, max_bytes=making.max_bytes))

    def submit(work: tuple[list[Sample], list[Pair]]) -> Future[Made]:
        made = making.process(work[1]) if work[1] else []
        if isinstance(made, Future):
            return made
        done: Future[Made] = Future()
        done.set_result(made)
        return done

    try:
        with replacing(target) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for (batch, opened), made in ordered(submit, batches(), 2 * making.workers):
                if len(made) != len(opened):
                    raise InputError(f"process: expected the files of {len(opened)} samples, got {len(made)}")
                for sample, files in zip(opened, made):
                    if isinstance(files, BrokenSample):
                        skipped.add(files.args[0], sample.place, files.args[1])
                    elif making.sidecar:
                        count += 1
                        _add(tar, {"__key__": sample.files["__key__"], **files})
                    else:
                        sample.files.update(files)
                for copied in () if making.sidecar else batch:
                    count += not _IMAGE_OR_TEXT.isdisjoint(suffix.rpartition(".")[2] for suffix in copied)
                    _add(tar, copied)
                making.advance(len(batch))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        again = "the same command goes on when there is more room"
        raise InputError(f"out: {target} could not be written: {error.strerror}; {again}") from None
    entry = {"samples": count, **identity(target), **_origin(source, making.sidecars)}
    if skipped.counts:
        entry["skipped"] = {reason: [n, skipped.examples[reason]] for reason, n in sorted(skipped.counts.items())}
    return entry


def _whole(samples: Iterator[Sample], skipped: Skipped, max_bytes: int) -> Iterator[Sample]:
    """Yields the samples with the bytes of their files. A sample with too many bytes is left out and counted."""
    for sample in samples:
        try:
            yield contents(sample, max_bytes)
        except BrokenSample as broken:
            if broken.args[0] == UNREADABLE:  # the shard has changed while it was read
                raise ShardError(f"shard {sample['__url__']!r}: {broken.args[1]}") from None
            skipped.add(broken.args[0], place_of(sample), broken.args[1])


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, data in sample.items():
        if suffix not in ("__key__", "__url__") and data is not None:
            member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
            member.size, member.mtime, member.mode = len(data), 0, 0o444
            member.uname = member.gname = "simplclip"
            tar.addfile(member, io.BytesIO(data))
