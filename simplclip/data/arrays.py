"""Arrays of numpy's files (.npy, .npz) from elsewhere: no more is read than is there, whatever a header promises."""

from __future__ import annotations

import io
import math
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np

from simplclip.data.tar import MAX_BYTES

_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile decompresses these piece by piece, the others at once


def header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype by the header of an .npy file. Raises ValueError, and others."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"expected version 1.0 of numpy's format, got {version[0]}.{version[1]}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"expected an array of numbers or text, got {dtype} {list(shape)}")
    return shape, fortran, dtype


def from_bytes(data: bytes) -> np.ndarray:
    """The array of an .npy file, which can only be read. Raises ValueError, and others for a broken header."""
    file = io.BytesIO(data)
    shape, fortran, dtype = header(file)
    need, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if need != there:
        raise ValueError(f"expected {need:,} bytes of {dtype} {list(shape)}, got {there:,}")
    return np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C")


def from_npz(path: str | os.PathLike, *names: str, max_bytes: int = MAX_BYTES) -> list[np.ndarray]:
    """Arrays of an .npz file. Raises ValueError, and others for a damaged one; also if one has more than `max_bytes`."""
    with zipfile.ZipFile(path) as archive:
        return [from_bytes(_member(archive, name, max_bytes)) for name in names]


def shape_in_npz(path: str | os.PathLike, name: str) -> tuple[int, ...]:
    """The shape of an array of an .npz file, by its header. Errors as `from_npz`."""
    with zipfile.ZipFile(path) as archive, archive.open(info := _info(archive, name, math.inf)) as file:
        shape, _, dtype = header(file)
        if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {info.file_size:,} bytes")
        return shape


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    info = _info(archive, name, max_bytes)
    with archive.open(info) as file:
        return file.read(info.file_size)  # without a number it would decompress up to 2 GiB at once


def _info(archive: zipfile.ZipFile, name: str, max_bytes: float) -> Any:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in _PLAIN or info.file_size > max_bytes:
        raise ValueError(f"{name}: expected at most {max_bytes:,} bytes, plain or deflated, got {info.file_size:,}")
    return info
