"""A lock, so that one process at a time trains in a folder.

The file run.lock names the process and its host, and is locked (flock) while the process lives: the system releases the lock
when the process ends, however it ends. If the file system has no locks, only the names decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from simplclip.train.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()  # descriptors of this process's locks


def _close_inherited_locks() -> None:
    """Closes inherited locks in a forked loader process, which may live seconds longer than a killed trainer."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


class RunLock:
    """Context that locks `folder` for this process, and makes it if necessary.

    At the end run.lock is removed, and so are the folders that were made, unless they contain files.
    `note` is a warning if the file system has no locks, else None.

    Raises ConfigError for a folder in use, naming the process and its host; nothing in the folder is changed then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run.lock"
        self.note: str | None = None
        self._made: list[Path] = []
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"run.out: expected a folder, got the file {self.folder}")
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            while not self._take():
                pass
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.path.unlink(missing_ok=True)  # while it is locked: a process that has opened it notices the removal
        if self._file is not None:
            _held.discard(self._file)
            os.close(self._file)
        self._remove_made()

    def _take(self) -> bool:
        """Locks the file; False if another process removed the file or the folder in between."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return False
        try:
            reason = _lock(file)
            if reason is None and not _is_at(file, self.path):
                return False
            if reason is not None:
                self._ask_names(file)
                self.note = (
                    f"{self.path} names this process, but cannot be locked ({reason}): two runs that start at the same time "
                    "do not notice each other, and after a crash a start on another host asks to delete the file"
                )
            self._write_names(file)
            if reason is None:
                self._file, file = file, None
                _held.add(self._file)
            return True
        except BlockingIOError:
            raise ConfigError(
                f"run.out: expected a folder that no process trains in, got {self.folder}: {_who(file)}"
            ) from None
        finally:
            if file is not None:
                os.close(file)

    def _write_names(self, file: int) -> None:
        try:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _ask_names(self, file: int) -> None:
        pid, host = _names(file)
        if pid is not None and not (host == socket.gethostname() and _is_over(pid)):
            raise ConfigError(
                f"run.out: expected a folder that no process trains in, got {self.folder}: {_who(file)}, as {self.path} "
                "says. If that process is over, delete this file"
            )

    def _remove_made(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty any more
                path.rmdir()


def _lock(file: int) -> str | None:
    """Locks the file; returns the reason if the system has no locks. Raises BlockingIOError if another process holds it."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror
    return None


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _names(file: int) -> tuple[int | None, str | None]:
    try:
        os.lseek(file, 0, os.SEEK_SET)
        found = json.loads(os.read(file, 4096))
        return int(found["pid"]), str(found["host"])
    except (ValueError, LookupError, TypeError):
        return None, None


def _who(file: int) -> str:
    pid, host = _names(file)
    return "a process that is starting does" if pid is None else f"process {pid} on host {host} does"


def _is_over(pid: int) -> bool:
    """Whether the process `pid` of this host is alive. Our own number is that of an earlier process."""
    if pid == os.getpid():
        return True
    if fcntl is None:  # signal 0 would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
