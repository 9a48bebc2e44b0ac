"""`simplclip data pack`: makes the shards that training reads of a table, a JSON file or a folder.

    OUT/NAME-000000.tar ...   each sample's image as it is, and a json with its captions, label,
                              group and "source"
    OUT/meta.json             the source, and the samples and bytes of each shard and what was left
                              out of it

A shard has the samples of SAMPLES rows of the source. It gets its name when it is complete, so the
same command continues after a stop. Processes on every core read the rows, and each writes shards.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from simplclip.common.errors import InputError
from simplclip.common.files import (
    FULL_DISK,
    remove_leftovers,
    replacing,
    size_and_time,
    write_atomically,
)
from simplclip.common.processes import cores
from simplclip.common.progress import Progress, print_lines
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.images import JPEGS, is_transparent, open_image
from simplclip.data.rows import (
    NO_OPTIONS,
    Options,
    PairRow,
    RowSource,
    is_address,
    is_source,
    open_source,
    split_of,
)
from simplclip.data.samples import captions_of, file_bytes, record_of
from simplclip.data.shards import entries_of, meta_of
from simplclip.data.workers import from_workers

FORMAT = "simplclip-shards-2"
SAMPLES = 1024  # rows of a shard
TRANSPARENT = "with transparency, which the model does not see"


class TarFolder:
    """A folder of tars and its meta.json: `about`, which says how they are made, and `entries`.

    An entry of a tar, by its file name: {"samples", "bytes", "skipped" and "remarks" (each reason
    -> [count, the first]), ...}; of 0 bytes there is no file.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        """Notes the arguments; nothing is read or written before `open`."""
        self.out = out
        self.about = json.loads(json.dumps(dict(about)))
        self.entries: dict[str, dict[str, Any]] = {}
        self.complete = False  # whether all tars are finished, where a command knows it

    def open(self) -> None:
        """Makes the folder, or takes the whole tars that an earlier run made.

        Raises InputError, and changes nothing, if it is a file, holds other files, or tars of
        something else.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out: expected a folder, got the file {self.out}")
        self.out.mkdir(parents=True, exist_ok=True)
        former = meta_of(self.out)
        if former.get("format") == self.about["format"]:
            entries = entries_of(self.out)
            whole = {n: e for n, e in entries.items() if e["bytes"] == _size_of(self.out / n)}
            self.entries = whole
            self.complete = former.pop("complete", False) and whole == entries
            former.pop("splits", None)
            if former != self.about:
                raise InputError(
                    f"out: expected {self.out} to hold what an earlier run made of the same data "
                    f"with the same settings, got other ones: was {former}, now {self.about}; "
                    "remove it or choose another folder"
                )
        # `pack_shards` makes the folder "shards" for this command
        elif others := [path.name for path in self.out.glob("[!.]*") if path.name != "shards"]:
            raise InputError(
                f"out: expected a new folder or that of an earlier run, got {self.out}, which "
                f"holds other files ({min(others)})"
            )
        remove_leftovers(self.out, lambda name: True)
        if not self.complete:
            self.save()

    def save(self) -> None:
        """Replaces meta.json by `about`, `entries` and `complete` as they are now."""
        samples = sum(entry["samples"] for entry in self.entries.values())
        content = self.about | ({"complete": True} if self.complete else {})
        shards = dict(sorted(self.entries.items()))
        content["splits"] = {"data": {"samples": samples, "shards": shards}}
        write_atomically(self.out / "meta.json", json.dumps(content, indent=1) + "\n")


def _size_of(tar: Path) -> int:
    """Returns the bytes of a file, 0 if there is none."""
    return tar.stat().st_size if tar.is_file() else 0


def entry_of(
    tar: Path, samples: int, skipped: Skipped, remarks: Skipped | None = None
) -> dict[str, Any]:
    """Returns the entry of a tar for meta.json, see TarFolder; its bytes are 0 if it is no file."""
    entry: dict[str, Any] = {"samples": samples, "bytes": _size_of(tar)}
    for name, counted in (("skipped", skipped), ("remarks", remarks)):
        if counted is not None and counted.counts:
            counts = sorted(counted.counts.items())
            entry[name] = {reason: [n, counted.examples[reason]] for reason, n in counts}
    return entry


def skipped_in(entries: Iterable[Mapping[str, Any]], name: str = "skipped") -> Skipped:
    """Returns the sum over entries of what was left out of tars, or of their "remarks"."""
    skipped = Skipped()
    for entry in entries:
        for reason, (count, first) in entry.get(name, {}).items():
            skipped.merge(Skipped(Counter({reason: count}), {reason: first}))
    return skipped


@contextlib.contextmanager
def new_tar(path: Path) -> Iterator[TarWriter]:
    """Context with a tar to write; it gets its name when the block ends without an error.

    It replaces a file of this name. Raises InputError if the disk is full.
    """
    try:
        with replacing(path) as file:
            # without time and user
            names = {"user": "simplclip", "group": "simplclip"}
            with TarWriter(file, **names, mtime=0.0, encoder=False) as tar:
                yield tar
    except OSError as error:
        if error.errno not in (*FULL_DISK, errno.ENOSPC):
            raise
        raise InputError(
            f"out: {path} could not be written: {error.strerror}; the same command goes on when "
            "there is more room"
        ) from None


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options = NO_OPTIONS,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Writes shards of `source`, and meta.json, to the folder `out`; returns the shards' paths.

    Rows without a usable image and caption are left out, counted and named in meta.json; images are
    opened, not decoded. Shards that an earlier run made of the same source are kept: of a table or
    JSON file of the same size and time, of a folder of the same name.

    Args:
        source: what `rows.open_source` takes.
        options: of tables and JSON files.
        workers: processes, by default one for each core.
        progress: print lines.

    Raises: InputError (the source is none, no row is usable, `out` has other shards or files, the
    disk is full); DataLoader's RuntimeError (a process died).
    """
    rows = open_source(source, options)
    file, _ = split_of(os.path.expanduser(os.fspath(source)))
    state = size_and_time(file) if os.path.isfile(file) else {}
    name = os.path.basename(os.path.abspath(source))
    about = {"name": name, **state, **options.given()}
    folder = TarFolder(Path(os.path.expanduser(out)), {"format": FORMAT, "source": about})
    folder.open()
    kept = folder.complete
    if not kept:
        _write_missing_shards(rows, folder, cores() if workers is None else workers, progress)
    entries = folder.entries.values()
    shards = [name for name, entry in sorted(folder.entries.items()) if entry["samples"]]
    if progress:
        samples = sum(entry["samples"] for entry in entries)
        shard_word = "shard" if len(shards) == 1 else "shards"
        where = f"{len(shards)} {shard_word}, {folder.out / '*.tar'}"
        result = f"{samples:,} samples of {rows.name} in {where}"
        skipped = skipped_in(entries)
        if kept:
            print_lines(f"kept {result}, which an earlier run packed; remove it to pack again")
        else:
            print_lines(f"packed {result}" + (f"; {skipped}" if skipped.counts else ""))
        remarks = skipped_in(entries, "remarks")
        for remark, count in remarks.counts.items():
            example = f"such as {remarks.examples[remark]!r}; see Pixels in docs/data.md"
            print_lines(f"warning: {count:,} {remark}, {example}")
    return [str(folder.out / name) for name in shards]


def pack_shards(data: Any, out: str | os.PathLike, *, progress: bool = True) -> Any:
    """Packs `data`, if it is the path of a table, JSON file or folder, to OUT/NAME; returns the
    paths of its shards.

    Other data are returned as they are, but a list of one path counts as the path. Raises the
    errors of `pack`.
    """
    path = data[0] if isinstance(data, (list, tuple)) and len(data) == 1 else data
    if not isinstance(path, (str, os.PathLike)) or not is_source(path):
        return data
    return pack(path, Path(out, _stem(os.fspath(path))), progress=progress)


def _stem(path: str) -> str:
    """Returns the name for shards of a source: its file name with _ for other characters."""
    name = os.path.basename(os.path.abspath(split_of(path)[0]))
    return re.sub(r"[^\w-]+", "_", os.path.splitext(name)[0]) or "data"


def _write_missing_shards(
    source: RowSource, folder: TarFolder, workers: int, progress: bool
) -> None:
    """Writes the shards that the folder lacks. Raises InputError if no row is usable."""
    stem = _stem(source.path)

    def entries(worker: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, entry) of each shard that process `worker` of `count` writes."""
        bad = Skipped()
        rows = source.rows(bad)
        for number, shard_rows in enumerate(iter(lambda: [*itertools.islice(rows, SAMPLES)], [])):
            name = f"{stem}-{number:06d}.tar"
            if number % count == worker and name not in folder.entries:
                yield name, _write_shard(folder.out / name, number * SAMPLES, shard_rows)
        if worker == 0 and bad.counts:
            yield source.name, entry_of(folder.out, 0, bad)

    done = sum(entry.get("rows", 0) for entry in folder.entries.values())
    with Progress("pack", source.total, done, unit="rows", shown=progress) as bar:
        for name, entry in from_workers(entries, workers if workers > 1 else 0):
            folder.entries[name] = entry
            folder.save()
            bar.update(entry.get("rows", 0))
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


def _write_shard(path: Path, first: int, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Writes the tar of some rows, of the number `first` on; returns its entry."""
    skipped, remarks = Skipped(), Skipped()
    samples = 0
    with new_tar(path) as tar:
        for number, row in enumerate(rows, first):
            try:
                tar.write({"__key__": f"{number:09d}", **files_of(row, remarks)})
                samples += 1
            except BrokenSample as broken:
                skipped.add(broken.reason, row.name, broken.detail)
    if not samples:
        path.unlink()
    return entry_of(path, samples, skipped, remarks) | {"rows": len(rows)}


def files_of(row: PairRow, remarks: Skipped | None = None) -> dict[str, bytes]:
    """Reads the image and texts of a row; returns {suffix: bytes}: the image as it is, and a json.

    The json has "captions", "source" (the row's name), and "label" and "group" if the row has them;
    a label is also the group. A transparent image is added to `remarks`, if not None. Raises
    BrokenSample.
    """
    if row.problem:
        raise BrokenSample(*row.problem)
    texts = {suffix: _read(path) for suffix, path in row.texts.items()}
    record = record_of(texts)
    captions = captions_of(texts, record if row.texts else {"captions": row.captions})
    image = _read(row.image)
    opened = open_image(image)
    form = str(opened.format)
    suffix = "jpg" if form in JPEGS else form.lower()
    if remarks is not None and is_transparent(opened):
        remarks.add(TRANSPARENT, row.image)
    record |= {"captions": [" ".join(caption.split()) for caption in captions], "source": row.name}
    if row.group is not None:
        record["group"] = row.group
    if row.label is not None:
        record |= {"label": row.label, "group": row.label}
    return {suffix: image, "json": json.dumps(record).encode()}


def _read(path: str) -> bytes:
    """Returns the bytes of a file, at most MAX_BYTES."""
    if not os.path.exists(path) and is_address(path):
        detail = f"{path!r}, which is not a path; of URLs img2dataset makes shards"
        raise BrokenSample("not a local file", detail)
    try:
        return file_bytes(path)
    except FileNotFoundError:
        detail = f"{path!r} does not exist; try --images"
        raise BrokenSample("cannot be read", detail) from None
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise BrokenSample("cannot be read", error) from None
