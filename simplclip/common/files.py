"""Files that are written completely or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replace the contents of `path` by `data`; readers see the old file or the new one, never a part."""
    data = data.encode() if isinstance(data, str) else data
    with Replacing(path) as file:
        file.write(data)


class Replacing:
    """Context that opens a temporary file beside `path` and renames it to `path` if the block ends without an error."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is not None:
                with contextlib.suppress(OSError):  # closing flushes the buffer, which fails again on a full disk
                    self.file.close()
                return
            with self.file:
                self.file.flush()
                os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)
            sync_folder(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path, busy: str | None = None) -> Iterator[None]:
    """Context that one process at a time can enter for `folder`; without effect if the system has no locks.

    While another process is in, it waits, or raises FileExistsError(busy) if `busy` is given.
    """
    descriptor = None
    try:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise FileExistsError(busy) from None
        except OSError:  # also raised without support for flock
            pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def identity(path: str | Path) -> dict[str, Any]:
    """The size and SHA-256 of a file, as the meta.json of shards and the export.json of exports hold them."""
    return {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems that can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ: key -> (old, new)."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found
