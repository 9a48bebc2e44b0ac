"""Files that are written completely or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from simplclip.common.errors import InputError

WAIT = 6.0  # seconds in which the loader processes of a killed run end
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replaces the contents of `path` by `data`; text is written as UTF-8.

    Readers see the old file or the new file, never a part of a file. The folder must exist.
    """
    if isinstance(data, str):
        data = data.encode()
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Context that opens a temporary file for bytes, and at the end renames it to `path`.

    After an error it is removed, and `path` stays as it was; see also `remove_leftovers`.
    """
    path = Path(path)
    # random: other users of a shared folder could put a link under a name that they guess
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    file = open(temporary, "xb")  # noqa: SIM115
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    finally:
        # after an error: closing flushes the buffer, which fails again on a full disk
        with contextlib.suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path, removable: Callable[[str], object]) -> None:
    """Removes files of `replacing` that killed processes left; removable: by the final name."""
    for path in Path(folder).glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and removable(match[1]):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Context in `folder` that one process at a time can enter; makes the folder and its parents.

    Of these, folders that are empty at the end are removed. Raises FileExistsError if another
    process stays inside for WAIT seconds, InputError for a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{name}: expected a folder, got the file {folder}")
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    lock = filelock.FileLock(file)
    try:
        try:
            lock.acquire(timeout=WAIT)
        except filelock.Timeout:
            raise FileExistsError(
                f"{name}: expected a folder that no other process writes to, got {folder}"
            ) from None
        yield
    finally:
        if made and [*folder.iterdir()] == [file]:
            file.unlink()
        lock.release()
        for part in made:
            with contextlib.suppress(OSError):  # not empty
                part.rmdir()


def check_writable(folder: Path, name: str) -> None:
    """Raises InputError if nothing can be written to a folder, or to where it would be made."""
    existing = next(filter(os.path.exists, (folder, *folder.absolute().parents)))
    if not os.access(existing, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{name}: expected a folder that can be written to, got {existing}")


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_and_time(path: str | os.PathLike) -> dict[str, int]:
    """Returns {"bytes", "mtime_ns"} of a file, which tell in a meta.json whether it has changed."""
    about = os.stat(path)
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys whose values differ between two nested dicts: key -> (old, new).

    A key that one of them lacks counts as None there.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed[prefix + name] = (a, b)
    return changed
