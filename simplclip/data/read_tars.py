"""The samples of tars, in stored order. webdataset opens streams and groups files, tarfile reads
the members.

What is no regular file is passed over, what is too large is not read and breaks its sample, and a
damaged part ends the tar. None of this ends the run unless on_error is "stop".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from simplclip.data.decode_images import IMAGE_SUFFIXES
from simplclip.data.errors import BrokenSample, ShardError, Skipped
from simplclip.data.find_sidecars import Folders, sidecars_of
from simplclip.data.find_sources import Address, Source
from simplclip.data.samples import (
    MAX_BYTES,
    TEACHER,
    TEACHER_JSON,
    TEXT_BYTES,
    Sample,
)

DAMAGED = "damaged tar"  # the reason under which a tar's damage is counted
RETRIES = (0.2, 1.0, 5.0)  # seconds to wait before a tar that could not be read is tried again
STALL = 60  # seconds without a byte after which a server counts as gone
TEXTS = ("txt", "json", "cls", TEACHER_JSON)
SUFFIXES = (*IMAGE_SUFFIXES, *TEXTS, TEACHER)  # files that are read

# most zeros after the block that ends a tar: tar fills its last record, which has 10,240 bytes and,
# by -b 2048, up to 1 MiB. More are a part that was never written, e.g. of a broken download.
_PADDING_BYTES = 1 << 20
_gopen = import_module("webdataset.gopen")  # the package has a function of this name too


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
    source: Source,
    skipped: Skipped,
    *,
    sidecars: Folders | None = None,
    max_bytes: int = MAX_BYTES,
    on_error: str = "skip",
) -> Iterator[Sample]:
    """Yields the samples of a tar in stored order, with the files of its sidecars.

    A sample is a dict of "__key__", "__url__", "__shard__" and its files of SUFFIXES: suffix in
    lower case -> bytes, or a BrokenSample for a file that was not read, since it is too large. A
    stream or disk that fails is tried again, from the sample where it failed.

    skipped: damage of the tar is added to it. sidecars: their folders, if not None; then a key that
    comes again is a broken sample. max_bytes: most bytes of a file.

    Raises ShardError if it fails after several tries, if on_error is "stop" and the tar is damaged,
    and for a sidecar that is missing or damaged, or has other samples than an undamaged shard.
    """
    yielded = 0  # samples, in all tries
    for wait in (*RETRIES, None):
        damage = Skipped()
        samples = _samples(source, damage, max_bytes, on_error)
        if sidecars is not None:
            samples = _with_sidecars(samples, source.url, sidecars, damage)
        try:
            for number, sample in enumerate(samples):
                new_damage = damage.take()
                # an earlier try yielded the samples before, and counted the damage there
                if number == yielded:
                    yielded += 1
                    skipped.merge(new_damage)
                    yield sample
            skipped.merge(damage)
            return
        except OSError as error:
            if wait is None:
                reason = error.strerror or str(error) or type(error).__name__
                raise ShardError(f"shard {str(source.url)!r} cannot be read: {reason}") from error
            time.sleep(wait)


def _with_sidecars(
    samples: Iterator[Sample], shard: str, folders: Folders, damage: Skipped
) -> Iterator[Sample]:
    """Yields the samples of a shard, to which the files of its sidecars are added in place.

    Raises ShardError for a sidecar that is missing or damaged, and at the end for one with samples
    that the shard lacks, unless `damage` says that the shard lost some.
    """
    paths = sidecars_of(shard, folders)
    sidecars = [_sidecar_samples(path) for path in paths]
    # of each sidecar the first sample that is not joined yet
    next_samples = [next(sidecar, None) for sidecar in sidecars]
    seen: set[str] = set()
    for sample in samples:
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
    if damage.counts[DAMAGED]:  # the sidecar may have samples that the shard has lost
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


def _samples(source: Source, skipped: Skipped, max_bytes: int, on_error: str) -> Iterator[Sample]:
    """Yields the samples of a tar in one try; they end at damage, without a sample it cut short."""
    damage: list[Damage] = []

    def count_double(error: Exception) -> bool:
        skipped.add("duplicate file in tar", source.name, error.args[0])
        return True

    for sample in group_by_keys(_members(source, skipped, max_bytes, damage), handler=count_double):
        # If the sample before the damage is incomplete, only the damage is counted.
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


def _members(
    source: Source, skipped: Skipped, max_bytes: int, damage: list[Damage]
) -> Iterator[dict[str, Any]]:
    """Yields files as webdataset's `group_by_keys` takes them; `damage` has what ends them."""
    unread_key = None  # of the sample whose file is being read
    try:
        with (
            _opened(source.url) as (stream, mode),
            tarfile.open(fileobj=stream, mode=mode, bufsize=1 << 20, tarinfo=Member) as archive,
        ):
            for member, key, suffix in _used_members(archive):
                limit = min(TEXT_BYTES, max_bytes) if suffix in TEXTS else max_bytes
                unread_key = key
                data = _contents(archive, member, limit)
                unread_key = None
                yield {"fname": member.name, "data": data, "__url__": source.url}
            _check_rest(archive)
    except (OSError, ShardError):
        raise
    except Exception as error:  # the type depends on the damage
        damage.append(Damage(str(error) or type(error).__name__, unread_key))


def _used_members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yields (header, key, suffix in lower case) of an archive's files that belong to samples."""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]
        key, suffix = base_plus_ext(member.name)
        if member.isreg() and suffix is not None and suffix.lower() in SUFFIXES:
            yield member, key, suffix.lower()


def count_samples(path: str, limit: int) -> tuple[int, int]:
    """Returns the number of samples at the beginning of a tar, at most `limit`, and their bytes.

    Only headers are read. They end at a damaged part, and where the file cannot be read.
    """
    keys: list[str] = []
    end = 0
    # the type of an error depends on the damage
    with (
        contextlib.suppress(Exception),
        _opened(path) as (file, mode),
        tarfile.open(fileobj=file, mode=mode, tarinfo=Member) as archive,
    ):
        for _, key, _ in _used_members(archive):
            if keys[-1:] != [key]:
                if len(keys) == limit:
                    break
                keys.append(key)
            end = archive.offset
    return len(keys), end


def _check_rest(archive: tarfile.TarFile) -> None:
    """Raises ReadError if more than tar's padding follows the zero block that ended an archive."""
    # no more is read, since zeros may go on for gigabytes
    zeros = 0
    while zeros <= _PADDING_BYTES and (block := archive.fileobj.read(1 << 16)):
        if block.count(0) < len(block):
            raise tarfile.ReadError("data after the end of the archive")
        zeros += len(block)
    if zeros > _PADDING_BYTES:
        raise tarfile.ReadError(f"more than {_PADDING_BYTES:,} zeros at the end of the archive")


def _contents(
    archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int
) -> bytes | BrokenSample:
    """Returns the current member's bytes; a BrokenSample for one that is too large."""
    if member.size > limit:
        return BrokenSample(
            "file too large", f"{member.name} of {member.size:,} bytes, expected at most {limit:,}"
        )
    archive.fileobj.seek(member.offset_data)  # extractfile would take three times as long
    data = archive.fileobj.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, Any]]:
    """Context with a tar's stream and tarfile's mode for it; a command is killed at its end."""
    if not isinstance(url, Address):
        # reading a named pipe or a device may take for ever
        if not stat.S_ISREG(os.stat(url).st_mode):
            raise ShardError(f"shard {url!r}: expected a regular file")
        with open(url, "rb") as file:
            yield file, "r:"
        return
    stream = _curl(url) if url.startswith("http") else _gopen.gopen(str(url))
    try:
        yield stream, "r|"
    except Exception as error:
        # whether the stream ended too early; else the tar is damaged
        stream_broke = isinstance(error, OSError) or not stream.stream.read(1)
        if stream_broke and stream.proc.wait(60):
            message = f"the command ended with exit code {stream.proc.returncode}"
            if stream.proc.stderr:
                message = stream.proc.stderr.read().decode(errors="replace").strip() or message
            raise OSError(message) from None
        raise
    finally:
        # it may write on, or wait for something, after the end of the tar
        stream.ignore_errors = True
        stream.proc.kill()
        stream.close()
        if stream.proc.stderr:
            stream.proc.stderr.close()


def _curl(url: str) -> Any:
    """Starts curl on a URL; returns webdataset's Pipe of its output.

    Unlike webdataset's gopen_curl it gives up on a server that sends nothing for STALL seconds, and
    has no retries, which would start the output again in the middle of the tar.
    """
    if shutil.which("curl") is None:
        raise ShardError(f"shard {url!r}: expected the program curl, which fetches URLs, got none")
    limits = ["--connect-timeout", "30", "--speed-limit", "1", "--speed-time", str(STALL)]
    schemes = ["--proto", "=http,https", "--proto-redir", "=http,https", "--globoff"]
    command = ["curl", "-f", "-sS", "-L", *limits, *schemes, "--", str(url)]
    return _gopen.Pipe(command, mode="rb", stderr=subprocess.PIPE)
