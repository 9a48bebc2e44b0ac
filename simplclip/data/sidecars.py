"""Sidecars: folders of tars with the names of the data's shards, whose files are joined to the
samples by key.

    data/train-000000.tar       KEY.jpg, KEY.txt
    taught/train-000000.tar     KEY.teacher.npy, KEY.teacher.json
    taught/meta.json            how they were made, and the samples and bytes of each

A sidecar's file replaces the sample's file of the same suffix. A sidecar has its samples in the
order of the shard, and may lack some. To write them, worker processes read, decode and prepare the
samples, and this one computes on whole batches and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from simplclip.common import ranks
from simplclip.common.errors import InputError, check_count
from simplclip.common.files import size_and_time
from simplclip.common.progress import Progress, print_lines
from simplclip.data.errors import BrokenSample, ShardError, Skipped
from simplclip.data.pack import TarFolder, entry_of, new_tar, skipped_in
from simplclip.data.samples import MAX_BYTES, TEACHER, TEACHER_JSON, Pair, Sample, parse
from simplclip.data.shards import (
    DAMAGED,
    Address,
    Source,
    dataset_size,
    entries_of,
    name_of,
    read_tar,
    sources_of,
)
from simplclip.data.workers import Collated, Portion, Prepared, StoredOrder

FORMAT = "simplclip-sidecars-1"

Folders = Sequence[str | os.PathLike]
Files = Sequence[Mapping[str, bytes]]  # the new files of each sample of a batch, by suffix


def sidecars_of(shard: str, folders: Folders) -> list[str]:
    """Returns a shard's sidecars, one in each folder. Raises ShardError if one is no file."""
    paths = [os.path.join(os.path.expanduser(folder), name_of(shard)) for folder in folders]
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
        first = named.setdefault(name_of(source.url), source)
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
    named = by_sidecar_name(sources)
    for folder in map(os.path.expanduser, folders):
        if not os.path.isdir(folder):
            raise InputError(f"sidecars: expected folders, got {str(folder)!r}, which is none")
        entries = entries_of(folder)
        for name, shard in named.items():
            (sidecar,) = sidecars_of(shard.url, [folder])
            expected = entries.get(name, {}).get("source", {}).get("bytes", shard.size)
            if shard.size not in (None, expected):
                raise ShardError(
                    f"shard {shard.url!r} has changed since its sidecar {sidecar!r} was made: "
                    f"expected {expected} bytes, got {shard.size}; run the command that wrote the "
                    "sidecar again"
                )


def read_joined(
    source: Source, skipped: Skipped, folders: Folders = (), **options: Any
) -> Iterator[Sample]:
    """Yields the samples of a shard as `read_tar`, with the files of its sidecars.

    A key that comes again is a broken sample. options: of `read_tar`. Raises ShardError for a
    sidecar that is missing or damaged, and at the end for one with samples that the shard lacks,
    unless damage cost the shard some.
    """
    paths = sidecars_of(source.url, folders)
    sidecars = [_sidecar_samples(path) for path in paths]
    # of each sidecar the first sample that is not joined yet
    next_samples = [next(sidecar, None) for sidecar in sidecars]
    seen: set[str] = set()
    before = skipped.counts[DAMAGED]
    for sample in read_tar(source, skipped, **options):
        key = sample["__key__"]
        if key in seen:  # the sidecars' files belong to the earlier sample
            sample["__double__"] = BrokenSample("duplicate key in tar")
        for index, new_files in enumerate(next_samples):
            if new_files is None or new_files["__key__"] != key or key in seen:
                continue
            # a former teacher's files are replaced, also if this one writes no digest
            if TEACHER in new_files:
                sample.pop(TEACHER_JSON, None)
            for suffix, content in new_files.items():
                if not suffix.startswith("__"):
                    sample[suffix] = content
            next_samples[index] = next(sidecars[index], None)
        seen.add(key)
        yield sample
    if skipped.counts[DAMAGED] > before:  # the sidecar may have samples that the shard has lost
        return
    for path, sidecar_sample in zip(paths, next_samples):
        if sidecar_sample is not None:
            raise ShardError(
                f"sidecar {path!r} has the sample {sidecar_sample['__key__']!r}, which its shard "
                "does not have in that place; make it again by the command that wrote it"
            )


def _sidecar_samples(path: str) -> Iterator[Sample]:
    """Yields the samples of a sidecar: a tar with more files for the samples of one shard."""
    try:
        yield from read_tar(Source(path, name=path), Skipped(), on_error="stop")
    except ShardError as error:
        raise ShardError(
            f"sidecar of {error}; remove it, and run the command that wrote it again"
        ) from error.__cause__


def write_sidecars(
    shards: Any,
    out: str | os.PathLike,
    prepare: Callable[[Pair], Prepared],
    process: Callable[[Collated], Files],
    *,
    stamp: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    collate: Callable[[list[Prepared]], Any] = list,
    workers: int = 0,
    sidecars: Folders = (),
    max_bytes: int = MAX_BYTES,
    title: str = "samples",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a sidecar of each of `shards`, and meta.json, to the folder `out`.

    Broken samples are left out and counted by reason. The bytes of a sidecar depend only on its
    shard, the functions and `batch_size`, not on the number of workers or ranks. Sidecars of an
    earlier run are kept, unless the size or time of their shard, or of a joined sidecar, is another
    one. All ranks have to call it; they divide the shards.

    Args:
        shards: tars, as `sources_of` takes them, of different file names.
        out: folder for the sidecars, other than those of the shards. It may be new, empty or that
            of an earlier run with the same stamp.
        prepare: function of a parsed sample, in a worker; BrokenSample leaves the sample out.
        process: function of a batch; returns {suffix: bytes} for each of its samples.
        stamp: keys of meta.json that describe how the files were made, e.g. {"teacher": {"name":
            ...}}; JSON types only.
        batch_size: most samples of a batch; they are of one shard.
        collate: function of a list of prepared samples, in the worker; returns a batch.
        workers: processes; 0 prepares in this process.
        sidecars: folders of sidecars that are joined to the samples first.
        max_bytes: a sample with a file of more bytes is left out and counted.
        title, progress: title of the progress that is shown, and whether to print at all.

    Returns: {"path", "shards" (their number), "written" (by this run), "samples", "skipped" (a
    Skipped)}.

    Raises: InputError (two shards have one file name, `out` is the folder of a shard or holds other
    files, an earlier run had another stamp, the disk is full), ShardError (a shard or sidecar
    cannot be read), DataLoader's RuntimeError (a process died).
    """
    check_count("batch_size", batch_size, 1)
    check_count("workers", workers, 0)
    out = Path(os.path.expanduser(out))
    sources = by_sidecar_name(sources_of(shards))
    check_sidecars(sources.values(), sidecars)
    for source in sources.values():
        is_file = not isinstance(source.url, Address)
        if is_file and out.resolve() == Path(source.url).resolve().parent:
            raise InputError(
                f"out: expected another folder than that of the shard {source.url!r}, got "
                f"{str(out)!r}"
            )
    folder = TarFolder(out, {"format": FORMAT, **stamp})

    def unfinished() -> tuple[dict[str, Any], dict[str, Any]]:
        folder.open()
        return _unfinished_origins(sources, folder, sidecars), folder.entries

    origins, folder.entries = ranks.on_first(unfinished)
    names = list(islice(origins, ranks.number(), None, ranks.count()))
    order = StoredOrder(
        [sources[name] for name in names],
        partial(read_joined, folders=sidecars, max_bytes=max_bytes),
        partial(_parse_and_prepare, prepare=prepare),
        batch_size,
        collate,
    )
    done = sum(folder.entries[name]["samples"] for name in sources if name not in origins)
    total = dataset_size([source.url for source in sources.values()])
    with Progress(title, total, done, shown=progress) as bar:
        written = _write(order.portions(workers), [out / name for name in names], process, bar)
        rank_entries = ((path.name, ranks.number(), entry) for path, entry in written)
        for name, writer, entry in ranks.gather_to_first(rank_entries):
            folder.entries[name] = entry | origins[name]
            folder.save()
            if writer != 0:  # the first rank's own samples are counted already
                bar.update(entry["samples"])
    entries = ranks.on_first(lambda: [folder.entries[name] for name in sources])
    skipped = skipped_in(entries)
    if progress and ranks.first():
        finished = len(sources) - len(origins)
        if finished:
            kept = f"{finished} of {len(sources)} sidecars in {out} were finished earlier"
            print(f"{kept} and are kept.")
        if skipped.counts:
            print_lines(f"Left out, or lost by damage: {skipped}")
    return {
        "path": str(out),
        "shards": len(sources),
        "written": len(origins),
        "samples": sum(entry["samples"] for entry in entries),
        "skipped": skipped,
    }


def _parse_and_prepare(sample: Sample, prepare: Callable[[Pair], Prepared]) -> Prepared:
    """Parses a sample and returns what `prepare` makes of it. Raises BrokenSample."""
    return prepare(parse(sample))


def _unfinished_origins(
    sources: Mapping[str, Source], folder: TarFolder, sidecars: Folders
) -> dict[str, dict[str, Any]]:
    """Returns {sidecar name: state of its files} of those that are missing or of older files.

    These are the states before anything is read: of a shard that is replaced meanwhile, the next
    command makes the sidecar again.
    """
    origins = {}
    for name, source in sources.items():
        origin = {
            "source": {} if isinstance(source.url, Address) else size_and_time(source.url),
            "sidecars": [size_and_time(path) for path in sidecars_of(source.url, sidecars)],
        }
        if name not in folder.entries or not origin.items() <= folder.entries[name].items():
            origins[name] = origin
    return origins


def _write(
    portions: Iterator[Portion[Collated]],
    targets: Sequence[Path],
    process: Callable[[Collated], Files],
    bar: Progress,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Writes the sidecars at `targets`; yields (path, entry) of each complete one."""
    for source, of_source in groupby(portions, lambda portion: portion.source):
        target, samples, skipped = targets[source], 0, Skipped()
        with new_tar(target) as tar:
            for portion in of_source:
                skipped.merge(portion.skipped)
                samples += len(portion.keys)
                bar.update(len(portion.keys) + portion.skipped.counts.total())
                if portion.batch is not None:
                    for key, files in zip(portion.keys, process(portion.batch), strict=True):
                        tar.write({"__key__": key, **files})
        yield target, entry_of(target, samples, skipped)
