"""The members of a tar: of a local uncompressed one by its headers alone, of others as they are read."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
AHEAD = 4 << 20  # bytes that the system is asked to read ahead of the headers
_BLOCK = tarfile.BLOCKSIZE
_MODULUS = 65521  # of Adler-32
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


class Span(NamedTuple):
    """Bytes of a file that are read when they are needed."""

    file: str
    offset: int
    size: int


def is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith(_COMPRESSED)


def members(path: str) -> Iterator[tuple[str, Span]]:
    """Name and place of each regular file in a local uncompressed tar; only headers are read.

    Raises: OSError, and tarfile.ReadError at a damaged part, after the members before it.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, end, place = file.fileno(), os.fstat(file.fileno()).st_size, 0
        buffer, start = b"", 0
        name: str | None = None  # from a header of its own, for the next member
        length: int | None = None
        while True:
            if not start <= place <= start + len(buffer) - _BLOCK:
                buffer, start = os.pread(descriptor, 8 * _BLOCK, place), place
            header = buffer[place - start : place - start + _BLOCK]
            if len(header) < _BLOCK:  # a whole tar ends with blocks of zeros
                raise tarfile.ReadError(f"truncated header at byte {place}" if header or place else "empty file")
            if not (header[0] or header.strip(b"\0")):
                return
            kind, size, checksum = header[156:157], _number(header[124:136]), _number(header[148:156])
            if size is None or checksum is None or (_sum(header) - sum(header[148:156]) + 256 - checksum) % _MODULUS:
                raise tarfile.ReadError(f"bad header at byte {place}")
            place += _BLOCK
            if kind in b"xgLK":  # not a member, but about the next one
                text = os.pread(descriptor, size, place)
                if len(text) < size:
                    raise tarfile.ReadError("unexpected end of data")
                if kind == b"L":
                    name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif kind == b"x":
                    records = _records(text)
                    name = records.get("path", name)
                    length = int(records["size"]) if "size" in records else length
            else:
                size = size if length is None else length
                if place + size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if kind in b"0\0007":
                    yield name or _name(header), Span(path, place, size)
                elif kind in b"123456":  # links, devices and folders have no data
                    size = 0
                name = length = None
            place += -(-size // _BLOCK) * _BLOCK


def read_ahead(path: str, found: Iterable[tuple[str, Span]]) -> Iterator[tuple[str, Span]]:
    """The same members, while the system is asked to read the contents of the next ones."""
    if not hasattr(os, "posix_fadvise"):
        yield from found
        return
    with open(path, "rb", buffering=0) as file:
        advised = 0
        for name, span in found:
            if span.offset >= advised:
                size = span.offset - advised + 2 * AHEAD
                os.posix_fadvise(file.fileno(), advised, size, os.POSIX_FADV_WILLNEED)
                advised = span.offset + AHEAD
            yield name, span


def streamed(file: BinaryIO | str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file in a tar, compressed or not, from the start to the end. Errors as `members`."""
    source = {"name": file} if isinstance(file, str) else {"fileobj": file}
    with tarfile.open(mode="r|*", tarinfo=_Header, **source) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep every header
            if member.isreg():
                yield member.name, tar.extractfile(member).read()


def read(spans: list[Span]) -> list[bytes]:
    """The bytes of spans of one file. Raises OSError, also if the file has become shorter."""
    with open(spans[0].file, "rb", buffering=0) as file:
        first = min(span.offset for span in spans)
        last = max(span.offset + span.size for span in spans)
        if last - first > sum(span.size for span in spans) + 16 * _BLOCK:  # members of a sample mostly lie side by side
            found = [os.pread(file.fileno(), span.size, span.offset) for span in spans]
        else:
            whole = os.pread(file.fileno(), last - first, first)
            found = [whole[span.offset - first : span.offset - first + span.size] for span in spans]
    for span, data in zip(spans, found):
        if len(data) != span.size:
            raise OSError(f"{span.file}: expected {span.size} bytes at {span.offset}, got {len(data)}")
    return found


class _Header(tarfile.TarInfo):
    """Raises for unreadable headers, all but the first of which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            if tar.offset == 0:
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _number(field: bytes) -> int | None:
    """A number of a header, octal or (GNU, for more than 8 GiB) binary; None if it is neither."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    for digits in (field.rstrip(b"\0 "), field.split(b"\0", 1)[0].strip()):  # something may follow a number's end
        try:
            return int(digits or b"0", 8)
        except ValueError:
            continue
    return None


def _sum(header: bytes) -> int:
    """The sum of the bytes modulo _MODULUS, which zlib computes ten times as fast as Python."""
    return (zlib.adler32(header) & 0xFFFF) - 1


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(text: bytes) -> dict[str, str]:
    """The records of a pax header: "LENGTH KEY=VALUE\\n"."""
    records: dict[str, str] = {}
    if b"path=" not in text and b"size=" not in text:  # most have only times
        return records
    while text[:1].isdigit():
        length, _, _ = text.partition(b" ")
        record, text = text[len(length) + 1 : int(length) - 1], text[int(length) :]
        key, _, value = record.partition(b"=")
        records[key.decode("ascii", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
