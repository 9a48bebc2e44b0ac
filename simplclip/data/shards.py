"""Shards: the tars that a user names, their samples in stored order, and the meta.json beside them.

webdataset opens streams and groups files, tarfile reads the members. A file that is too large is
not read and breaks its sample, and a damaged part ends the tar. Neither ends the run unless
on_error is "stop".
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from simplclip.common.errors import InputError
from simplclip.data.errors import BrokenSample, ShardError, Skipped
from simplclip.data.images import IMAGE_SUFFIXES
from simplclip.data.rows import ENDINGS
from simplclip.data.samples import MAX_BYTES, TEACHER, TEACHER_JSON, Sample, json_of

DAMAGED = "damaged tar"  # the reason under which a tar's damage is counted
SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls", TEACHER_JSON, TEACHER)  # files that are read
# most zeros after the block that ends a tar: tar fills its last record, which has 10,240 bytes and,
# by -b 2048, up to 1 MiB. More are a part that was never written, e.g. of a broken download.
PADDING_BYTES = 1 << 20
_EXPECTED = (
    "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"
)
_NO_TAR = (*ENDINGS, ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_gopen = import_module("webdataset.gopen")  # the package has a function of this name too


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run; the path of a file stays a
    plain str.

    Only `sources_of` makes addresses, from what a user typed.
    """


@dataclass(frozen=True)
class Source:
    """A tar."""

    url: str
    weight: float = 1.0  # how often it comes in an epoch
    name: str = ""  # in messages and seeds; it stays if the data move

    @property
    def size(self) -> int | None:
        """The bytes of the file; None for a stream, and for a file that is not there."""
        is_file = not isinstance(self.url, Address) and os.path.isfile(self.url)
        return os.path.getsize(self.url) if is_file else None


def sources_of(shards: Any, name: str = "shards") -> list[Source]:
    """Returns the tars that a user names, in order, each with its weight and a name of its own.

    shards:

    - a tar by path, brace pattern (train-{000000..000003}.tar) or glob;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a
      tar;
    - a mapping of "shards" (one of these or a list) and "weight" (how often its shards come in an
      epoch; of a fraction a random share, drawn in each epoch);
    - a list of these.

    A text that names an existing file is that file, whatever it begins with. A pathlib.Path is
    never a URL or command. A tar that is named twice comes twice. Files are looked up, but not
    opened; nothing is fetched or run.

    name: name of the argument in errors. Raises InputError if `shards` do not exist or are none of
    these.
    """
    sources = list(_sources(shards, name))
    if not sources:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    return _named(sources)


def _sources(shards: Any, name: str) -> Iterator[Source]:
    """Yields the sources of an argument of `sources_of`, or of a part of it, without names."""
    if isinstance(shards, (str, os.PathLike)):
        yield from map(Source, _urls(shards, name))
    elif isinstance(shards, Mapping):
        if "shards" not in shards or not shards.keys() <= {"shards", "weight"}:
            expected = "a mapping with shards and, if need be, weight"
            raise InputError(f"{name}: expected {expected}, got {dict(shards)}")
        weight = shards.get("weight", 1.0)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
        for source in _sources(shards["shards"], name):
            yield replace(source, weight=source.weight * weight)
    elif isinstance(shards, Iterable):
        for entry in shards:
            yield from _sources(entry, name)
    else:
        raise InputError(f"{name}: expected {_EXPECTED}, got {shards!r}")


def _urls(shards: str | os.PathLike, name: str) -> Iterator[str]:
    """Yields what a text or path names: existing files (str), or URLs or commands (Address)."""
    text = os.fspath(shards)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        patterns = [path]
    elif isinstance(shards, str) and text.startswith(("pipe:", "http://", "https://")):
        yield from map(Address, _expanded(text, name))
        return
    elif "://" in text:
        hint = f"of other places name a command, e.g. 'pipe:aws s3 cp {text} -'"
        raise InputError(f"{name}: expected {_EXPECTED}, got {text!r}; {hint}")
    else:
        patterns = _expanded(path, name)
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not paths:
            reason = "which matches none" if glob.has_magic(pattern) else "which does not exist"
            raise InputError(f"{name}: expected files, got {pattern[:200]!r}, {reason}")
        for tar in paths:
            if os.path.isdir(tar) or tar.lower().endswith(_NO_TAR):
                raise InputError(
                    f"{name}: expected tars, not compressed, got {tar!r}; `simplclip data pack` "
                    "makes them of a table, a JSON file or a folder of images"
                )
            yield tar


def _expanded(pattern: str, name: str) -> list[str]:
    """Returns the names that a pattern with {000..003} or {a,b} stands for; other braces stay."""
    try:
        return [*braceexpand.braceexpand(pattern, escape=False)]
    except ValueError as error:
        raise InputError(f"{name}: expected a brace pattern, got {pattern!r}: {error}") from None


def name_of(url: str) -> str:
    """Returns the file name of a path or URL, or of the last tar that a pipe:COMMAND names."""
    return os.path.basename(_path_of(url))


def _path_of(url: str) -> str:
    """Returns the path whose end names a tar: of a command its last word up to .tar."""
    if not isinstance(url, Address):
        return url
    if url.startswith("http"):
        return urlsplit(url).netloc + urlsplit(url).path
    return [url, *re.findall(r"\S+\.tar\b", url)][-1]


def _named(sources: Iterable[Source]) -> list[Source]:
    """Returns sources with names: that of the file, of files of one name the paths from their
    common parent, since their samples may have the same keys.
    """
    by_name: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        is_file = not isinstance(source.url, Address)
        whole = os.path.abspath(source.url) if is_file else source.url
        by_name[name_of(source.url)][whole].append(source)
    names: dict[str, str] = {}
    for name, same in by_name.items():
        paths = [_path_of(whole).split("/") for whole in same]
        parent = len(os.path.commonprefix(paths))
        for (whole, copies), path in zip(same.items(), paths):
            different = "/".join(path[parent:]) or whole
            names |= {source.url: different if len(same) > 1 else name for source in copies}
    return [replace(source, name=names[source.url]) for source in sources]


def in_words(sources: Iterable[Source]) -> str:
    """Returns the names of sources for a message: "'a.tar' (and 3 more files)"."""
    first, *more = dict.fromkeys(source.url for source in sources)
    if not more:
        return repr(str(first))
    file_word = "file" if len(more) == 1 else "files"
    return f"{str(first)!r} (and {len(more)} more {file_word})"


class Damage(NamedTuple):
    """Where a tar ended by damage."""

    reason: str
    key: str | None  # of the sample whose file could not be read; None for damage between files


class Member(tarfile.TarInfo):
    """A header that is damaged ends the tar by ReadError; tarfile would take most of them for the
    end of the archive.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        """Reads an archive's next header. Raises ReadError, with its place, for damage."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad header at byte {archive.offset}: {error}") from None


def read_tar(
    source: Source, skipped: Skipped, *, max_bytes: int = MAX_BYTES, on_error: str = "skip"
) -> Iterator[Sample]:
    """Yields the samples of a tar in stored order; they end at damage, without one it cut short.

    A sample is a dict of "__key__", "__url__", "__shard__" and its files of SUFFIXES: suffix in
    lower case -> bytes, or a BrokenSample for a file that was not read, since it has more than
    `max_bytes`. skipped: damage of the tar is added to it; a stream that fails is damage too.

    Raises ShardError for a file that cannot be read, and for damage if on_error is "stop".
    """
    damage: list[Damage] = []

    def count_double(error: Exception) -> bool:
        skipped.add("duplicate file in tar", source.name, error.args[0])
        return True

    members = _members(source, max_bytes, damage)
    for sample in group_by_keys(members, handler=count_double):
        # if the sample before the damage is incomplete, only the damage is counted
        any_caption = not {"txt", "json"}.isdisjoint(sample)
        any_image = not {*IMAGE_SUFFIXES}.isdisjoint(sample)
        usable = any_caption and any_image
        if damage and (damage[0].key == sample["__key__"] or not usable):
            break
        yield sample | {"__shard__": source.name}
    if damage and on_error == "stop":
        raise ShardError(f"shard {str(source.url)!r} is damaged: {damage[0].reason}")
    if damage:
        skipped.add(DAMAGED, source.name, damage[0].reason)


def _members(source: Source, max_bytes: int, damage: list[Damage]) -> Iterator[dict[str, Any]]:
    """Yields files as webdataset's `group_by_keys` takes them; `damage` has what ends them."""
    unread_key = None  # of the sample whose file is being read
    try:
        with (
            _opened(source.url) as (stream, mode),
            tarfile.open(fileobj=stream, mode=mode, bufsize=1 << 20, tarinfo=Member) as archive,
        ):
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or suffix is None or suffix.lower() not in SUFFIXES:
                    continue
                unread_key = key
                data: Any
                if member.size > max_bytes:
                    size = f"{member.size:,} bytes, expected at most {max_bytes:,}"
                    data = BrokenSample("file too large", f"{member.name} of {size}")
                else:  # extractfile would take three times as long
                    archive.fileobj.seek(member.offset_data)
                    data = archive.fileobj.read(member.size)
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                unread_key = None
                yield {"fname": member.name, "data": data, "__url__": source.url}
            _check_rest(archive)
    except ShardError:
        raise
    except Exception as error:  # the type depends on the damage
        if isinstance(error, OSError) and not isinstance(source.url, Address):
            reason = error.strerror or str(error)
            raise ShardError(f"shard {source.url!r} cannot be read: {reason}") from error
        damage.append(Damage(str(error) or type(error).__name__, unread_key))


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, Any]]:
    """Context with a tar's stream and tarfile's mode for it; a command is killed at its end."""
    if not isinstance(url, Address):
        with open(url, "rb") as file:
            yield file, "r:"
        return
    stream = _gopen.gopen(str(url))
    try:
        yield stream, "r|"
    finally:
        # it may write on, or wait for something, after the end of the tar
        stream.ignore_errors = True
        stream.proc.kill()
        stream.close()


def _check_rest(archive: tarfile.TarFile) -> None:
    """Raises ReadError if more than tar's padding follows the zero block that ended an archive."""
    # no more is read, since zeros may go on for gigabytes
    zeros = 0
    while zeros <= PADDING_BYTES and (block := archive.fileobj.read(1 << 16)):
        if block.count(0) < len(block):
            raise tarfile.ReadError("data after the end of the archive")
        zeros += len(block)
    if zeros > PADDING_BYTES:
        raise tarfile.ReadError(f"more than {PADDING_BYTES:,} zeros at the end of the archive")


def meta_of(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the meta.json of a folder of tars; {} without a JSON object."""
    try:
        meta = json_of(Path(os.path.expanduser(folder), "meta.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def entries_of(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Returns {file name of a tar: its entry} of a folder's meta.json.

    {} without one that `simplclip` writes.
    """
    entries: dict[str, dict[str, Any]] = {}
    try:
        for split in meta_of(folder)["splits"].values():
            _ = [entry["samples"] + entry["bytes"] for entry in split["shards"].values()]
            entries |= split["shards"]
    except (LookupError, TypeError, AttributeError):
        return {}
    return entries


def teacher_stamp(folders: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Returns what sidecar folders' meta.json says of the teacher whose features they have.

    Keys are "name", "width" (numbers of a feature), "logit_scale", "views" if it saw views, and
    more. The last of the folders whose meta.json names a teacher counts. Raises ShardError if there
    is none.
    """
    for folder in reversed(folders):
        stamp = meta_of(folder).get("teacher")
        if stamp:
            return stamp
    names = [str(folder) for folder in folders]
    raise ShardError(
        "data.sidecars: expected a teacher's features, which `simplclip teacher` writes, got "
        f"{names}"
    )


def dataset_size(shards: Any) -> int | None:
    """Returns the number of samples in an epoch of shards, from the meta.json beside them.

    A shard counts as often as its weight says. shards: as `sources_of` takes them; they are not
    read. None if a shard is a stream, or is not listed with its present size, and if there is less
    than one sample.
    """
    sources = sources_of(shards)
    counts = listed_samples(sources)
    if None in counts:
        return None
    weighted = [(count or 0) * source.weight for count, source in zip(counts, sources)]
    return round(sum(weighted)) or None


def listed_samples(sources: Sequence[Source]) -> list[int | None]:
    """Returns the samples of each tar by the meta.json beside it; None as `dataset_size`."""
    entries = {folder: entries_of(folder) for folder in {os.path.dirname(s.url) for s in sources}}
    counts: list[int | None] = []
    for source in sources:
        folder, name = os.path.split(source.url)
        entry = entries[folder].get(name, {})
        known = bool(entry) and entry["bytes"] == source.size
        counts.append(entry["samples"] if known else None)
    return counts


def estimated_samples(sources: Sequence[Source]) -> list[float] | None:
    """Returns the samples of each tar, by meta.json, else by its bytes and the first tar's samples.

    None if one is a stream.
    """
    if any(isinstance(source.url, Address) for source in sources):
        return None
    listed = listed_samples(sources)
    if None not in listed:
        return [float(count or 0) for count in listed]
    first = [*islice(read_tar(sources[0], Skipped()), 100)]
    lengths = [len(data) for sample in first for data in sample.values() if isinstance(data, bytes)]
    # each file has a header of a block, and fills its last block
    sample_bytes = (sum(lengths) + tarfile.BLOCKSIZE * 1.5 * len(lengths)) / max(1, len(first))
    return [
        (source.size or 0) / max(1.0, sample_bytes) if count is None else count
        for count, source in zip(listed, sources)
    ]
