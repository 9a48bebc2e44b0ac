"""numpy's files (.npy, .npz), which may come from anywhere. A header that promises more than there is allocates nothing.

.npz files of any size are written and read in parts.
"""

from __future__ import annotations

import functools
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import numpy as np

from simplclip.data.tar import MAX_BYTES

_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile decompresses these piece by piece, the others at once


def header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, Fortran order (a bool) and dtype from the header of an .npy file. Raises ValueError or other errors."""
    start = file.read(10)  # the fixed part in version 1.0, whose last two bytes are the length of the rest
    return _parsed(start + file.read(int.from_bytes(start[8:], "little")))


@functools.lru_cache(64)
def _parsed(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parses a header. Cached: most samples share a few headers, and parsing one takes as long as reading the array."""
    file = io.BytesIO(text)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"expected version 1.0 of numpy's format, got {version[0]}.{version[1]}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"expected an array of numbers or text, got {dtype} {list(shape)}")
    return shape, fortran, dtype


def from_bytes(data: bytes) -> np.ndarray:
    """Returns the array of an .npy file, read-only. Raises ValueError, and other errors for a broken header."""
    file = io.BytesIO(data)
    shape, fortran, dtype = header(file)
    need, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if need != there:
        raise ValueError(f"expected {need:,} bytes of {dtype} {list(shape)}, got {there:,}")
    return np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C")


def from_npz(path: str | os.PathLike, *names: str, max_bytes: int = MAX_BYTES) -> list[np.ndarray]:
    """Reads arrays of an .npz file. Raises ValueError if one exceeds `max_bytes`, and ValueError or others for damage."""
    with zipfile.ZipFile(path) as archive:
        return [from_bytes(_member(archive, name, max_bytes)) for name in names]


def header_in_npz(path: str | os.PathLike, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads shape and dtype of an array of an .npz file from its header. Raises the errors of `from_npz`."""
    with zipfile.ZipFile(path) as archive, archive.open(info := _info(archive, name, math.inf)) as file:
        shape, _, dtype = header(file)
        if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {info.file_size:,} bytes")
        return shape, dtype


def mapped_in_npz(path: str | os.PathLike, name: str) -> Callable[[], np.ndarray]:
    """Returns a function that maps an uncompressed array of an .npz file into memory. Raises the errors of `from_npz`."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name}: expected an array that is not compressed")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # the lengths of name and extra field, before the contents
        lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
        file.seek(member.header_offset + 30 + sum(lengths))
        shape, fortran, dtype = header(file)
        mapped = functools.partial(np.memmap, path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    mapped()  # raises ValueError if there are fewer bytes
    return mapped


def items_in_npz(path: str | os.PathLike, name: str, places: Sequence[int]) -> list[Any]:
    """Reads the items at ascending places of a one-dimensional array of an .npz file; no other items stay in memory."""
    found = []
    with zipfile.ZipFile(path) as archive, archive.open(_info(archive, name, math.inf)) as file:
        _, _, dtype = header(file)
        start = file.tell()
        for place in places:
            file.seek(start + place * dtype.itemsize)  # reads on to there, a few MB at a time
            found.append(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
    return found


def add_to_npz(
    archive: zipfile.ZipFile,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    parts: Iterable[Any],
    compression: int = zipfile.ZIP_DEFLATED,
) -> None:
    """Adds an array, given in parts, to an .npz file that is being written."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = compression
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        for part in parts:
            member.write(np.asarray(part, dtype).tobytes())


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    info = _info(archive, name, max_bytes)
    with archive.open(info) as file:
        return file.read(info.file_size)  # without a size it would decompress up to 2 GiB at once


def _info(archive: zipfile.ZipFile, name: str, max_bytes: float) -> Any:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in _PLAIN or info.file_size > max_bytes:
        raise ValueError(f"{name}: expected at most {max_bytes:,} bytes, plain or deflated, got {info.file_size:,}")
    return info
