"""Tars that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from simplclip.common.errors import InputError
from simplclip.common.files import replacing

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_tar(path: str | Path) -> Iterator[tarfile.TarFile]:
    """Context with a tar that gets its name when the block ends without an error. Raises InputError if the disk is full."""
    try:
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            yield tar
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(
            f"out: {path} could not be written: {error.strerror}; the same command goes on when there is more room"
        ) from None


def add(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    """Adds the files of a sample, by suffix. The bytes depend on nothing else."""
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size, member.mtime, member.mode = len(content), 0, 0o444
        member.uname = member.gname = "simplclip"
        tar.addfile(member, io.BytesIO(content))
