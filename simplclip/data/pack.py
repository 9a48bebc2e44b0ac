"""`simplclip data pack`: tables, JSON, folders and streams as local shards; also before a teacher or captioner writes files
beside shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.common.files import remove_leftovers, temporary_folder
from simplclip.common.progress import Progress
from simplclip.data.broken import Skipped
from simplclip.data.pairs import count, parts_of
from simplclip.data.parts import Part, read_part
from simplclip.data.shards import Pair, usable

FORMAT = "simplclip-shards-1"  # in meta.json, the same as that of shards which `rewrite` makes
SAMPLES = 1024  # most samples in a shard


def pack(what: Any, out: str | os.PathLike, *, progress: bool = True) -> list[str]:
    """Copies all samples that `what` names into shards in the folder `out`, as `local_shards` does; returns the shards."""
    return _packed(parts_of(what), Path(out), progress)


def local_shards(what: Any, out: str | os.PathLike, *, progress: bool = True) -> list[str]:
    """Returns the local tars that `what` names, and the shards in the folder OUT.shards to which it copies other samples.

    A copy has the image, and a json with the captions, the label and group if there are any, and "source", the sample's name.
    Broken samples are left out and counted. The folder appears when it is complete. A folder that an earlier run made of the
    same files is used again, even if images have changed since. Raises InputError as `parts_of` does, if no sample is usable,
    and if the folder holds anything else; ShardError if a stream cannot be read.
    """
    parts = parts_of(what)
    others = [part for part in parts if not part.is_local_tar]
    folder = Path(f"{os.fspath(out).rstrip(os.sep)}.shards")
    return [part.url for part in parts if part.is_local_tar] + (_packed(others, folder, progress) if others else [])


def _packed(parts: list[Part], folder: Path, progress: bool) -> list[str]:
    packed = _digest(parts)
    made = not folder.exists() or not any(folder.iterdir())
    if made:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, folder.name.__eq__)
        skipped = Skipped()
        with temporary_folder(folder) as new:
            shards = _write(parts, new, skipped, progress)
            samples = sum(shard["samples"] for shard in shards.values())
            about = {"format": FORMAT, "packed": packed, "splits": {"data": {"samples": samples, "shards": shards}}}
            (new / "meta.json").write_text(json.dumps(about, indent=1) + "\n")
            new.rename(folder)
        if progress:
            print(f"packed {samples:,} samples of {parts[0].url} into {folder / '*.tar'}, which training reads; {skipped}")
    try:
        about = json.loads((folder / "meta.json").read_text("utf-8"))
        if about["packed"] != packed:
            raise ValueError("those of other files")
        found = [str(folder / name) for name in sorted(about["splits"]["data"]["shards"])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"out: expected {folder} to hold the shards of {parts[0].url}, got {error}; remove it or choose another --out"
        ) from None
    if progress and not made:
        print(f"kept {folder / '*.tar'}, which an earlier run made of the same files")
    return found


def _write(parts: list[Part], folder: Path, skipped: Skipped, progress: bool) -> dict[str, Any]:
    """Writes the shards; returns the entry of each in meta.json."""
    shards: dict[str, Any] = {}
    stem = re.sub(r"[^\w-]+", "_", Path(parts[0].name).stem) or "data"
    with Progress("pack", sum(count(parts) or ()) or None, shown=progress) as bar:
        samples = enumerate(_samples(parts, skipped))
        while some := next(samples, None):
            path = folder / f"{stem}-{len(shards):06d}.tar"
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for number, files in itertools.chain([some], itertools.islice(samples, SAMPLES - 1)):
                    for suffix, data in files.items():
                        member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    bar.update(1)
            shards[path.name] = {"samples": number + 1 - len(shards) * SAMPLES, "bytes": path.stat().st_size}
    if not shards:
        raise InputError(f"shards: expected images with captions, got none that is usable in {parts[0].url!r}; {skipped}")
    return shards


def _samples(parts: list[Part], skipped: Skipped) -> Iterator[dict[str, bytes]]:
    for part in parts:
        names = part.classes.names if part.classes else None
        for sample in usable(read_part(part, skipped), skipped, use=lambda opened: None):
            yield _files(sample, names)


def _files(sample: Pair, names: list[str] | None) -> dict[str, bytes]:
    """Returns the files of a sample's copy: suffix -> bytes."""
    suffix = next(suffix for suffix, data in sample.files.items() if data is sample.encoded)
    record = sample.record | {"captions": sample.captions, "source": sample.place}
    number = sample.files.get("__label__")
    if names and number is not None:
        record["label"] = names[number]
    return {suffix: sample.encoded, "json": json.dumps(record).encode()}


def _digest(parts: list[Part]) -> str:
    """Hashes the names of the parts, the size and time of files, and the names of the files in folders."""
    found = hashlib.sha256()
    for part in parts:
        status = os.stat(part.url) if os.path.isfile(part.url) else None
        state = (status.st_size, status.st_mtime_ns) if status else ()
        found.update(repr((part.name, str(part.url), state, getattr(part, "names", b""))).encode("utf-8", "surrogateescape"))
    return found.hexdigest()
