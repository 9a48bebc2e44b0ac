"""Rewrites shards: every sample is copied with new files that a function makes for it, e.g. a teacher's features.

The new folder has only complete shards at any moment: a shard gets its name after all of it is on disk. After a crash the
same command continues with the first unfinished shard, and the result has the same bytes.

    OUT/<name>.tar        the samples of the shard of that name, in the same order
    OUT/meta.json         how they were made; at the end also "splits" with the samples, bytes and sha256 of each shard
    OUT/LICENSES.md       that of the input folder, if it has one
    OUT/.finished.jsonl   while unfinished: one line for each finished shard
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from simplclip.common.errors import InputError
from simplclip.common.files import differences, replacing, sha256, write_atomically
from simplclip.data.shards import (
    IMAGE_SUFFIXES,
    BrokenSample,
    Sample,
    Skipped,
    count_samples,
    expand,
    open_sample,
    place_of,
    read_shard,
)

FORMAT = "simplclip-shards-1"
_JOURNAL = ".finished.jsonl"
_OWN_KEYS = ("format", "splits")


@dataclass
class Opened:
    """A sample that is not broken."""

    image: Image.Image  # RGB
    captions: list[str]  # at least one, see `shards.captions_of`
    record: dict[str, Any]  # the json, or {}
    files: Sample  # "__key__", "__url__" and the bytes by suffix

    @property
    def place(self) -> str:
        """ "<shard's file name>/<key>": a name of the sample that is the same on every run."""
        return place_of(self.files)


Process = Callable[[list[Opened]], list[dict[str, bytes]]]


def rewrite(
    shards: str | os.PathLike | Iterable[str | os.PathLike],
    out: str | os.PathLike,
    process: Process,
    *,
    stamp: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    drop: Mapping[str, str] | None = None,
    progress: bool = True,
    title: str = "samples",
) -> dict[str, Any]:
    """Write the samples of `shards` to shards of the same names in the folder `out`, with the files that `process` makes.

    All files of a sample are kept (suffixes in lower case); files from `process` replace those of the same suffix or are
    added after them. Files without a suffix, which belong to no sample, are dropped. Broken samples are copied without
    processing and counted by reason; of a damaged tar the samples before the damage are kept, and the damage is counted. The
    bytes of a shard depend only on its input, on `process` and on `batch_size`; .gz, .xz or .bz2 is removed from its name.

    Finished shards of an earlier run are kept, unless their input has changed. A second command may add other shards of the
    same folder. Keys of the input folder's meta.json, e.g. the stamp of an earlier rewriting, are copied.

    Args:
        shards: path, brace expression or glob of local tar files, or a list of them.
        out: a new folder, or that of an earlier run with the same `stamp`.
        process: maps at most `batch_size` samples of one shard to {suffix: bytes} for each. Its exceptions end the run.
        stamp: keys of meta.json that describe how the new files were made, e.g. {"teacher": {"name": ...}}; JSON types only.
        batch_size: samples given to `process` at a time.
        drop: suffix -> key of meta.json. These files and keys are not copied, since they are made again or no longer fit.
        progress: show a progress bar (on a terminal) and print the notes.
        title: title of the bar.

    Returns: {"path", "shards" (their number), "written" (by this run), "samples", "skipped" (a Skipped), "notes"}.

    Raises: ValueError if two shards have one file name, `out` is the folder of an input, input folders have different
    meta.json, or an earlier run had another stamp; FileExistsError if `out` holds other files or another process writes to
    it; ShardError if a shard cannot be opened.

    Memory: one batch of samples.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    out, drop = Path(out).expanduser(), dict(drop or {})
    sources = _named(expand(shards), out)
    meta = _carried(sources.values(), {*drop.values(), *stamp}) | json.loads(json.dumps(dict(stamp)))
    with _claimed(out, meta, sources.values()) as finished:
        todo = {name: source for name, source in sources.items() if not _is_finished(out / name, finished.get(name), source)}
        dropped, made = Counter(), set()
        with _bar(sources, todo, finished, title, progress) as bar, open(out / _JOURNAL, "a", encoding="utf-8") as journal:
            for name, source in todo.items():
                finished[name] = _rewrite_shard(source, out / name, process, batch_size, drop, dropped, made, bar)
                journal.write(json.dumps({name: finished[name]}) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        _finish(out, meta, finished)
    skipped = Skipped()
    for name in sources:
        for reason, (count, first) in finished[name].get("skipped", {}).items():
            skipped.merge(Skipped(Counter({reason: count}), {reason: first}))
    notes = []
    if len(todo) < len(sources):
        notes.append(f"{len(sources) - len(todo)} of {len(sources)} shards in {out} were finished earlier and are kept.")
    for suffix, count in dropped.items():
        fate = "made again" if suffix in made else "dropped, since it no longer fits"
        notes.append(f"{count} samples already had {suffix}; it is {fate}.")
    if skipped.counts:
        notes.append(f"Copied without processing, or lost by damage: {skipped}")
    if progress:
        for note in notes:
            print(note)
    return {
        "path": str(out),
        "shards": len(sources),
        "written": len(todo),
        "samples": sum(finished[name]["samples"] for name in sources),
        "skipped": skipped,
        "notes": notes,
    }


def _named(files: list[str], out: Path) -> dict[str, str]:
    """The name of each new shard -> its input."""
    sources: dict[str, str] = {}
    for file in files:
        if out.resolve() in (Path(file).resolve().parent, Path(file).parent.resolve()):
            raise InputError(f"out: expected another folder than that of the input {file!r}, got {str(out)!r}")
        name = re.sub(r"\.tgz$", ".tar", re.sub(r"\.(gz|xz|bz2)$", "", Path(file).name))
        if name in sources:
            raise InputError(f"shards: expected files of different names, got {sources[name]!r} and {file!r}")
        sources[name] = file
    return sources


def _carried(files: Iterable[str], without: set[str]) -> dict[str, Any]:
    """The keys of the input folders' meta.json that are still valid for rewritten samples."""
    found: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        path = Path(folder, "meta.json")
        meta = _read_json(path) if path.is_file() else {}
        found[folder] = {key: value for key, value in meta.items() if key not in without and key not in _OWN_KEYS}
    (first, carried), *others = found.items()
    for folder, meta in others:
        if changed := differences(carried, meta):
            raise InputError(
                f"shards: expected folders with the same meta.json, got different {next(iter(changed))!r} in "
                f"{first or '.'!r} and {folder or '.'!r}; rewrite them one at a time, into different folders"
            )
    return carried


def _read_json(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text("utf-8"))
        if not isinstance(meta, dict):
            raise InputError(f"expected an object, got {type(meta).__name__}")
        return meta
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


@contextlib.contextmanager
def _claimed(out: Path, meta: dict[str, Any], files: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Make or take over the folder and lock it for this process; yields the finished shards by name."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        names = {path.name for path in out.iterdir()}
        finished: dict[str, Any] = {}
        if "meta.json" in names:
            former = _read_json(out / "meta.json")
            if former.pop("format", None) != FORMAT:
                raise FileExistsError(f"out: expected a new folder or an earlier run's, got {out} with another meta.json")
            for split in former.pop("splits", {}).values():
                finished |= split["shards"]
            if changed := differences(former, meta):
                changes = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise InputError(
                    f"out: expected the settings of the earlier run in {out}, got others: {changes}; choose another folder"
                )
            finished |= _read_journal(out / _JOURNAL)
        elif strangers := sorted(names - {".meta.json.tmp"}):
            raise FileExistsError(
                f"out: expected a new folder or that of an earlier run, got {out}, which holds other files ({strangers[0]})"
            )
        else:
            write_atomically(out / "meta.json", _as_text({"format": FORMAT} | meta))
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        _copy_licenses(out, files)
        # Drops a line that a crash cut short, to which the next one would be appended.
        write_atomically(out / _JOURNAL, "".join(json.dumps({name: entry}) + "\n" for name, entry in finished.items()))
        yield finished


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes of this machine; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(f"out: expected a folder that no other process writes to, got {folder}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _read_journal(path: Path) -> dict[str, Any]:
    finished: dict[str, Any] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut short by a crash; the shard is made again
            finished |= json.loads(line)
    return finished


def _copy_licenses(out: Path, files: Iterable[str]) -> None:
    texts = []
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        path = Path(folder, "LICENSES.md")
        if path.is_file() and path.read_bytes() not in texts:
            texts.append(path.read_bytes())
    if texts and not (out / "LICENSES.md").exists():
        write_atomically(out / "LICENSES.md", b"\n".join(texts))


def _is_finished(shard: Path, entry: dict[str, Any] | None, source: str) -> bool:
    return (
        entry is not None
        and shard.is_file()
        and shard.stat().st_size == entry["bytes"]
        and os.path.getsize(source) == entry["source"]["bytes"]
        and sha256(source) == entry["source"]["sha256"]
    )


def _bar(sources: dict[str, str], todo: dict[str, str], finished: dict[str, Any], title: str, progress: bool) -> tqdm:
    left = count_samples(list(todo.values()))
    done = sum(finished[name]["samples"] for name in sources if name not in todo)
    total = None if left is None else done + left
    return tqdm(total=total, initial=done, desc=title, unit=" samples", disable=None if progress else True)


def _rewrite_shard(
    source: str,
    target: Path,
    process: Process,
    batch_size: int,
    drop: Mapping[str, str],
    dropped: Counter[str],
    made: set[str],
    bar: tqdm,
) -> dict[str, Any]:
    """Write one shard; return its entry of meta.json."""
    skipped, count = Skipped(), 0
    with replacing(target) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        samples = read_shard(source, skipped, every=True)
        while batch := list(islice(samples, batch_size)):
            for sample in batch:
                gone = drop.keys() & sample.keys()
                dropped.update(gone)
                for suffix in gone:
                    del sample[suffix]
            for sample, files in zip(batch, _processed(batch, process, skipped)):
                made.update(files)
                sample |= files
                count += not _IMAGE_OR_TEXT.isdisjoint(suffix.rpartition(".")[2] for suffix in sample)
                _add(tar, sample)
            bar.update(len(batch))
    entry = {"samples": count, "bytes": target.stat().st_size, "sha256": sha256(target)}
    entry["source"] = {"bytes": os.path.getsize(source), "sha256": sha256(source)}
    if skipped.counts:
        entry["skipped"] = {reason: [n, skipped.examples[reason]] for reason, n in skipped.counts.items()}
    return entry


_IMAGE_OR_TEXT = {*IMAGE_SUFFIXES, "txt", "json"}  # suffixes that make a sample for other readers


def _processed(batch: list[Sample], process: Process, skipped: Skipped) -> list[dict[str, bytes]]:
    """The new files of each sample; none for a broken one."""
    files: list[dict[str, bytes]] = [{} for _ in batch]
    opened = {}
    for i, sample in enumerate(batch):
        try:
            opened[i] = Opened(*open_sample(sample), files=sample)
        except BrokenSample as broken:
            skipped.add(broken.args[0], place_of(sample), broken.args[1])
    if opened:
        made = process(list(opened.values()))
        if len(made) != len(opened):
            raise InputError(f"process: expected the files of {len(opened)} samples, got {len(made)}")
        for i, new in zip(opened, made):
            files[i] = new
    return files


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for suffix, data in sample.items():
        if suffix in ("__key__", "__url__"):
            continue
        member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
        member.size, member.mtime, member.mode = len(data), 0, 0o444
        member.uname = member.gname = "simplclip"
        tar.addfile(member, io.BytesIO(data))


def _finish(out: Path, meta: dict[str, Any], finished: dict[str, Any]) -> None:
    splits: dict[str, Any] = {}
    for name, entry in finished.items():
        split = splits.setdefault(re.split(r"[-_.]?\d|\.tar", name)[0] or "data", {"samples": 0, "shards": {}})
        split["samples"] += entry["samples"]
        split["shards"][name] = entry
    write_atomically(out / "meta.json", _as_text({"format": FORMAT} | meta | {"splits": splits}))
    (out / _JOURNAL).unlink()


def _as_text(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=1) + "\n"
