"""The members of a tar. A local uncompressed tar is listed by its headers alone; other tars are read from start to end.

Both use `_entries`, which parses headers itself: tarfile takes six times as long, holds as much in memory as a header
promises, and loops for ever over some headers. An invalid header ends the tar there by tarfile.ReadError.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

from webdataset.tariterators import base_plus_ext

ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
MAX_BYTES = 256 << 20  # most bytes that the files of a sample may have together, if no other limit is given
HOLES = -1  # the size of a sparse file, which is not read
UNREAD = -1  # the offset of a file of a stream, which was too large to be read
AHEAD = 4 << 20  # bytes that the system is asked to read ahead of the headers
_BLOCK = tarfile.BLOCKSIZE
_MODULUS = 65521  # of Adler-32
_LONGEST = 4096  # most bytes of a name; systems allow no longer path
_EXTENDED = 1 << 20  # most bytes of an extended header, which describes the next member
_IN_A_ROW = 100  # most extended headers before a member; no more than four have a use
_DICTIONARY = 256 << 20  # most bytes of memory that a decompressor may take for itself
_PIECE = 1 << 16  # bytes of a stream that are skipped at a time
_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


class Span(NamedTuple):
    """Bytes of a file that are read when they are needed; never, if the size is HOLES or the offset UNREAD."""

    file: str
    offset: int
    size: int


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...


def is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith(tuple(_COMPRESSED))


def members(path: str) -> Iterator[tuple[str, Span]]:
    """Yields name and place of each regular file in a local uncompressed tar; reads only headers.

    Raises OSError, and tarfile.ReadError at a damaged part, after the members before it.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
        buffer, start = b"", 0

        def fetch(place: int, size: int) -> bytes:
            nonlocal buffer, start
            if not start <= place <= start + len(buffer) - size:
                buffer, start = os.pread(descriptor, max(size, 8 * _BLOCK), place), place
            return buffer[place - start : place - start + size]

        yield from _entries(path, fetch, end)


def read_ahead(path: str, found: Iterable[tuple[str, Span]]) -> Iterator[tuple[str, Span]]:
    """Yields the members `found`, and asks the system to read the contents of the next ones ahead."""
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


def streamed(
    file: Readable, url: str, *, max_bytes: int = MAX_BYTES, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes | Span]]:
    """Yields name and content of each regular file in a tar, compressed or not, in order. Raises the errors of `members`.

    In place of the content it yields an unread Span for a file that is not `wanted`, that is sparse, or with which the files
    of the sample exceed `max_bytes`. Memory: what the consumer keeps, one file, and a constant.
    """
    forward = _Forward(_decompressed(file))
    key, held = None, 0
    for name, span in _entries(url, forward.fetch, math.inf):
        if (this := base_plus_ext(name)[0]) != key:
            key, held = this, 0
        if span.size == HOLES or held + span.size > max_bytes or not wanted(name):
            if span.size > 0 and not forward.fetch(span.offset + span.size - 1, 1):
                raise tarfile.ReadError("unexpected end of data")
            yield name, span._replace(offset=UNREAD)
            continue
        data = forward.fetch(span.offset, span.size)
        if len(data) < span.size:
            raise tarfile.ReadError("unexpected end of data")
        held += span.size
        yield name, data


def read(spans: list[Span]) -> list[bytes]:
    """Reads the bytes of spans of one file. Raises OSError, also if the file has become shorter."""
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


def _entries(url: str, fetch: Callable[[int, int], bytes], end: float) -> Iterator[tuple[str, Span]]:
    """Yields name and place of each regular file of the tar `url`, by the headers.

    fetch: fetch(offset, size) returns these bytes, fewer at the end; offsets never decrease. end: size of the tar, or inf.
    """
    place, extended = 0, 0
    name: str | None = None  # from an extended header, for the next member
    length: int | None = None
    sparse = False
    while True:
        header = fetch(place, _BLOCK)
        if len(header) < _BLOCK:  # a whole tar ends with blocks of zeros
            raise tarfile.ReadError(f"truncated header at byte {place}" if header or place else "empty file")
        if not (header[0] or header.strip(b"\0")):
            return
        kind, size, checksum = header[156:157], _number(header[124:136]), _number(header[148:156])
        if size is None or checksum is None or (_sum(header) - sum(header[148:156]) + 256 - checksum) % _MODULUS:
            raise tarfile.ReadError(f"bad header at byte {place}")
        place += _BLOCK
        if kind in b"xXgLK":  # an extended header, about the next member
            extended += 1
            if size > _EXTENDED or extended > _IN_A_ROW:
                raise tarfile.ReadError(f"bad header at byte {place - _BLOCK}: too many or too large ones before a member")
            text = fetch(place, size)
            if len(text) < size:
                raise tarfile.ReadError("unexpected end of data")
            if kind == b"L":
                name = _text(text)
            elif kind in b"xX":
                records = _records(text)
                name = _text(records[b"path"]) if b"path" in records else name
                length = _decimal(records[b"size"]) if b"size" in records else length
                if any(key.startswith(b"GNU.sparse.") for key in records):
                    sparse, name = True, _text(records.get(b"GNU.sparse.name", b"")) or name
        else:
            size = size if length is None else length
            if kind == b"S":  # GNU's older sparse files, which may have further blocks of headers
                sparse, more = True, header[482]
                while more:
                    block = fetch(place, _BLOCK)
                    if len(block) < _BLOCK:
                        raise tarfile.ReadError("unexpected end of data")
                    place, more = place + _BLOCK, block[504]
            if kind in b"123456":  # links, devices and folders have no data
                size = 0
            if place + size > end or (sparse and size and not fetch(place + size - 1, 1)):
                raise tarfile.ReadError("unexpected end of data")
            if kind in b"0\0007S":
                yield name or _name(header), Span(url, place, HOLES if sparse else size)
            name, length, sparse, extended = None, None, False, 0
        place += -(-size // _BLOCK) * _BLOCK


def _number(field: bytes) -> int | None:
    """Parses a number of a header, octal or (GNU, for more than 8 GiB) binary; None if it is neither or negative."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ")
    if not digits.isdigit():  # int() takes signs and more
        digits = field.split(b"\0", 1)[0].strip()  # something may follow a number's end
        if digits and not digits.isdigit():
            return None
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _sum(header: bytes) -> int:
    """Returns the sum of the bytes modulo _MODULUS, which zlib computes ten times as fast as Python."""
    return (zlib.adler32(header) & 0xFFFF) - 1


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    """Decodes the name in an extended header."""
    raw = raw.split(b"\0", 1)[0]
    if len(raw) > _LONGEST:
        raise tarfile.ReadError(f"a name of {len(raw):,} bytes")
    return raw.decode("utf-8", "surrogateescape")


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise tarfile.ReadError(f"bad size in a pax header: {digits[:20]!r}")
    return int(digits)


def _records(text: bytes) -> dict[bytes, bytes]:
    """Parses the records of a pax header: "LENGTH KEY=VALUE\\n"."""
    records: dict[bytes, bytes] = {}
    if b"path=" not in text and b"size=" not in text and b"GNU.sparse." not in text:  # most headers have only times
        return records
    place = 0
    while place < len(text) and text[place]:  # zeros may follow
        found = _RECORD.match(text, place)
        after = place + int(found[1]) if found else 0
        if not found or not found.end() < after <= len(text) or text[after - 1] != ord("\n"):
            raise tarfile.ReadError(f"bad pax header: {text[place : place + 20]!r}")
        records[found[2]] = text[found.end() : after - 1]
        place = after
    return records


class _Forward:
    """Reader of bytes at ascending offsets of a file, which is read once, from its start to its end."""

    def __init__(self, file: Readable) -> None:
        self.file, self.place = file, 0

    def fetch(self, place: int, size: int) -> bytes:
        while self.place < place:
            piece = len(self.file.read(min(place - self.place, _PIECE)))
            if not piece:
                return b""
            self.place += piece
        data = self.file.read(size)
        self.place += len(data)
        return data


class _Started(io.RawIOBase):
    """A stream whose first bytes have been read ahead, to tell its format; reading yields them again."""

    def __init__(self, file: Readable) -> None:
        self.file, self.start = file, b""
        while len(self.start) < 6 and (data := file.read(6 - len(self.start))):
            self.start += data
        self.left = self.start

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        data, self.left = self.left or self.file.read(len(room)), b""
        room[: len(data)] = data
        return len(data)


class _Decompressing(io.RawIOBase):
    """The decompressed data of a file, by a decompressor with bz2's interface. It never makes more than is asked for."""

    def __init__(self, file: Any, start: Callable[[], Any]) -> None:
        self.file, self.start, self.decompressor = file, start, start()

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        data = b""
        while not data:
            more = b""
            if self.decompressor.eof:  # another stream may follow, or zeros
                more = self.decompressor.unused_data or self.file.read1(io.DEFAULT_BUFFER_SIZE)
                if not more.strip(b"\0"):
                    return 0
                self.decompressor = self.start()
            elif self.decompressor.needs_input and not (more := self.file.read1(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("the compressed data end too early")
            try:
                data = self.decompressor.decompress(more, len(room))
            except Exception as error:  # each format has its own type
                raise tarfile.ReadError(f"invalid compressed data: {error}") from error
        room[: len(data)] = data
        return len(data)


_COMPRESSED: dict[bytes, Callable[[], Any] | None] = {
    b"\x1f\x8b": None,  # gzip, which has a reader of its own
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": partial(lzma.LZMADecompressor, memlimit=_DICTIONARY),
}


def _decompressed(file: Readable) -> Readable:
    raw = _Started(file)
    buffered = io.BufferedReader(raw, tarfile.RECORDSIZE)  # small, since a stream that breaks loses what is in the buffer
    for magic, start in _COMPRESSED.items():
        if raw.start.startswith(magic):
            return io.BufferedReader(_Decompressing(buffered, start), _PIECE) if start else gzip.GzipFile(fileobj=buffered)
    return buffered
