"""Tars that no program writes: headers by hand."""

import contextlib
import signal
import tarfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from support.data.pairs import png

BLOCK = tarfile.BLOCKSIZE
PNG = png()
# Fields of a header: offset and length.
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "magic": (257, 8),
    "prefix": (345, 155),
}


class Endless(BaseException):
    """Reading takes too long. It is no Exception, which a reader might take for damage."""


@contextlib.contextmanager
def in_time(seconds: float, subject: str = "") -> Iterator[None]:
    """Context that raises Endless(subject) after so many seconds of CPU time."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Endless(subject)

    previous_handler = signal.signal(signal.SIGPROF, interrupt)
    start = time.process_time()
    # what ends by itself before is judged below
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous_handler)
    if time.process_time() - start > seconds:
        raise Endless(subject)


def header(
    name: str = "a.png", size: int | bytes = 0, kind: bytes = b"0", **fields: bytes
) -> bytes:
    """Returns a header with these bytes in its fields, and with a checksum if none is given."""
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT))
    fields = {"name": name.encode("utf-8", "surrogateescape"), "type": kind} | fields
    if isinstance(size, int):
        octal = size < 8**11
        size = b"%011o\0" % size if octal else b"\x80" + size.to_bytes(11, "big")
    fields["size"] = size
    for field, value in fields.items():
        write_field(block, field, value)
    return bytes(block) if "checksum" in fields else summed(block)


def write_field(block: bytearray, field: str, value: bytes) -> None:
    offset, length = FIELDS[field]
    block[offset : offset + length] = value[:length].ljust(length, b"\0")


def summed(block: bytes) -> bytes:
    """Returns a header with its checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: str, data: bytes, kind: bytes = b"0", **fields: Any) -> bytes:
    """Returns a header and its data. fields: as for `header`, also the size that it claims."""
    return header(name, kind=kind, **{"size": len(data)} | fields) + padded(data)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return member("pax", b"".join(records), kind)


def record(key: bytes, value: bytes) -> bytes:
    """Returns a whole record of a pax header, which begins with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    digits = next(n for n in range(1, 9) if len(str(len(rest) + n)) == n)
    return str(len(rest) + digits).encode() + rest


def pair(number: int, image: bytes = PNG, text: bytes = b"a caption") -> bytes:
    return member(f"k{number}.png", image) + member(f"k{number}.txt", text)


END = bytes(2 * BLOCK)


def npy_that_claims(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """Returns an .npy file whose header names a shape that its data need not have."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-len(text) - 11 % 64 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
