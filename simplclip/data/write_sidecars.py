"""Writes sidecars, the new files that `simplclip teacher` and `simplclip caption` make for samples.

    OUT/NAME.tar      the new files of the samples of the shard NAME.tar, in its order
    OUT/meta.json     how they were made, and the samples and bytes of each finished sidecar and of
                      its shard

Worker processes read, decode and prepare the samples, each of shards of its own; this process
computes on whole batches and writes. A sidecar gets its name after all of it is on disk. After a
stop the same command goes on with the unfinished ones. Ranks divide the shards, and the first one
writes meta.json.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from simplclip.common import ranks
from simplclip.common.errors import InputError, check_count
from simplclip.common.files import size_and_time
from simplclip.common.progress import Progress, print_lines
from simplclip.data.errors import Skipped
from simplclip.data.find_sidecars import Folders, by_sidecar_name, check_sidecars, sidecars_of
from simplclip.data.find_sources import Address, Source, sources_of
from simplclip.data.read_meta import dataset_size
from simplclip.data.read_tars import read_tar
from simplclip.data.samples import MAX_BYTES, Pair, Sample, parse
from simplclip.data.stored_order import Collated, Portion, Prepared, StoredOrder
from simplclip.data.write_tars import TarFolder, add, entry_of, new_tar, skipped_in

FORMAT = "simplclip-sidecars-1"

Files = Sequence[Mapping[str, bytes]]  # the new files of each sample of a batch, by suffix


class UnfinishedTar(NamedTuple):
    """A sidecar that is being written."""

    closing: contextlib.ExitStack  # gives the tar its name
    tar: tarfile.TarFile
    skipped: Skipped
    keys: list[str]  # of the samples in it


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

    A sidecar has the files that are made for the shard's samples. Broken samples are left out and
    counted by reason. The bytes of a sidecar depend only on its shard, the functions and
    `batch_size`, not on the number of workers or ranks. Finished sidecars of an earlier run are
    kept, unless the size or time of their shard, or of a joined sidecar, is another one. A second
    command may add other shards. All ranks have to call it.

    Args:
        shards: tars, as `sources_of` takes them, of different file names.
        out: a new folder, or that of an earlier run with the same `stamp`.
        prepare: function of a sample, in a worker. It may raise BrokenSample.
        process: function of a collated batch, in this process; returns {suffix: bytes} for each of
            its samples.
        stamp: keys of meta.json that describe how the files were made, e.g. {"teacher": {"name":
            ...}}; JSON types only.
        batch_size: most samples of a batch; they are of one shard.
        collate: function of a list of prepared samples, in the worker too.
        workers: processes; 0 prepares in this process.
        sidecars: folders of sidecars that are joined to the samples first, e.g. with other
            captions.
        max_bytes: a sample with a file of more bytes is left out and counted.
        title, progress: title of the progress that is shown, and whether to print at all.

    Returns: {"path", "shards" (their number), "written" (by this run), "samples", "skipped" (a
    Skipped)}.

    Raises: InputError (two shards have one file name, `out` is the folder of a shard or holds other
    files, an earlier run had another stamp, the disk is full), FileExistsError (another process
    writes to `out`), ShardError (a shard or sidecar cannot be read), WorkerError (a process died).
    """
    check_count("batch_size", batch_size, 1)
    check_count("workers", workers, 0)
    out = Path(os.path.expanduser(out))
    sources = by_sidecar_name(sources_of(shards))
    urls = [source.url for source in sources.values()]
    check_sidecars(sources.values(), sidecars)
    for url in urls:
        if not isinstance(url, Address) and out.resolve() == Path(url).resolve().parent:
            raise InputError(
                f"out: expected another folder than that of the shard {url!r}, got {str(out)!r}"
            )
    folder = TarFolder(out, {"format": FORMAT, **stamp})
    rank = ranks.number()

    with contextlib.ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(folder.claimed()))
        origins, folder.entries = ranks.on_first(
            lambda: (_unfinished_origins(sources, folder, sidecars), folder.entries)
        )
        rank_names = list(islice(origins, rank, None, ranks.count()))
        order = StoredOrder(
            [sources[name] for name in rank_names],
            partial(read_tar, sidecars=sidecars, max_bytes=max_bytes),
            partial(_parse_and_prepare, prepare=prepare),
            batch_size,
            collate,
            divide_sources=True,
        )
        portions = stack.enter_context(contextlib.closing(order.portions(workers)))
        done = sum(folder.entries[name]["samples"] for name in sources if name not in origins)
        with Progress(title, dataset_size(urls), done, shown=progress) as bar:
            paths = [out / name for name in rank_names]
            written = _write(portions, paths, process, bar.update)
            rank_entries = ((path.name, rank, entry) for path, entry in written)
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
            print(
                f"{finished} of {len(sources)} sidecars in {out} were finished earlier and are "
                "kept."
            )
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
        if not folder.is_whole(name) or not origin.items() <= folder.entries[name].items():
            origins[name] = origin
    return origins


def _write(
    portions: Iterator[Portion[Collated]],
    targets: Sequence[Path],
    process: Callable[[Collated], Files],
    advance: Callable[[int], None],
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Writes the sidecars at `targets`; yields (path, entry) of each complete one."""
    unfinished: dict[int, UnfinishedTar] = {}
    with contextlib.ExitStack() as all_tars:
        for portion in portions:
            target = targets[portion.source]
            if portion.source not in unfinished:
                closing = all_tars.enter_context(contextlib.ExitStack())
                tar = closing.enter_context(new_tar(target))
                unfinished[portion.source] = UnfinishedTar(closing, tar, Skipped(), [])
            sidecar = unfinished[portion.source]
            sidecar.skipped.merge(portion.skipped)
            if portion.end:
                sidecar.closing.close()
                del unfinished[portion.source]
                yield target, entry_of(target, len(sidecar.keys), sidecar.skipped)
                continue
            if portion.batch is not None:
                for key, files in zip(portion.keys, process(portion.batch), strict=True):
                    add(sidecar.tar, key, files)
                sidecar.keys.extend(portion.keys)
            advance(len(portion.keys) + portion.skipped.counts.total())
