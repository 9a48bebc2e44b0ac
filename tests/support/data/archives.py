"""Tars that nobody would write: headers by hand, and mutations made from the number of a case."""

import contextlib
import gzip
import io
import random
import signal
import tarfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from support.data.pairs import png

BLOCK = tarfile.BLOCKSIZE
PNG = png()
# The files of a sample; None: random bytes.
SAMPLE = {"png": PNG, "txt": b"a caption", "json": b'{"group": 1}', "cls": b"3", "bin": None}
# Fields of a header: offset and length.
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "magic": (257, 8),
    "prefix": (345, 155),
}
# fmt: off
NUMBERS = (
    b"-0000000001\0", b"-1\0", b"+7\0", b"0o17\0", b"1_0\0", b"8\0", b"abc\0", b" \0", b"\0",
    b"7" * 12, b"0" * 12, b"\x80" + b"\0" * 10 + b"\x05", b"\x80" + b"\xff" * 11, b"\xff" * 12,
    b"\xff" + b"\0" * 11, b"\x80\0\0\0\x7f" + b"\xff" * 7, b"00000000644 ", b"\x81" + b"\0" * 11,
    b"00000001000\0", b"77777777777\0", "\u0663".encode() + b"\0",
)
RECORDS = (
    b"0 path=a\n", b"0 size=5\n", b"9z path=a\n", b"-5 path=a\n", b"12 size=abc\n",
    b"11 size=-5\n", b"9 size=5\n", b"8 size=5\n", b"14 size=99999\n", b"10 path=a\n",
    b"9 path=\n", b"13 path=a.txt\n", b"18 path=../../a.b\n", b"13 path=/a.tx\n",
    b"14 path=a\0.txt\n", b"12 path=\xff.jp\n", b"99999999999999999999 path=a\n",
    b"9" * 5000 + b" path=a\n", b"9999 path=a\n", b"29 size=9223372036854775808888\n",
    b"1_3 path=a.txt\n", b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n",
    b"24 GNU.sparse.map=0,5,9\n", b"29 GNU.sparse.size=9999999999\n",
    b"25 GNU.sparse.name=a.png\n", b"13 path=a.txt\0", b"path=a", b"=path=size=", b" ",
    b"18 SCHILY.x=\xc3\x28\xff\n", b"17 mtime=1.5e400\n", b"5000 path=" + b"a/" * 2490 + b"\n",
    b"21 hdrcharset=BINARY\n",
)
# fmt: on


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


def intact_tar(rng: random.Random) -> tuple[bytes, dict[str, bytes]]:
    """Returns a tar as programs write it, and its files: name -> content."""
    files: dict[str, bytes] = {}
    out = io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number in range(rng.randrange(1, 6)):
            key = drawn_key(rng, number, form)
            for suffix, data in SAMPLE.items():
                if rng.random() < 0.7:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    if data is None:
                        data = rng.randbytes(rng.randrange(0, 3000))
                    info.size = len(data)
                    info.mtime = rng.choice((0, 1.5))
                    files[info.name] = data
                    tar.addfile(info, io.BytesIO(data))
            if rng.random() < 0.2:
                info = tarfile.TarInfo(f"other{number}")
                info.type = rng.choice((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE))
                info.linkname = "k0.png"
                tar.addfile(info)
    return out.getvalue(), files


def drawn_key(rng: random.Random, number: int, form: int) -> str:
    """Returns the key of a sample: short, in a folder, or too long for the oldest form of a tar."""
    long_folder = "x" * rng.randrange(20, 90)
    key = rng.choice((f"k{number}", f"d/k{number}", f"{long_folder}/k{number}"))
    if form == tarfile.USTAR_FORMAT:
        return key
    long_name = "y" * rng.randrange(95, 300)
    return rng.choice((key, f"ключ{number}", f"{long_name}{number}"))


def header_offsets(data: bytes) -> list[int]:
    return [n for n in range(0, len(data), BLOCK) if data[n + 257 : n + 262] == b"ustar"]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def replace_blocks(data: bytes, rng: random.Random) -> bytes:
    """Replaces a block or inserts before it: copies of others, noise, zeros or ones."""
    source = BLOCK * rng.randrange(len(data) // BLOCK)
    target = BLOCK * rng.randrange(len(data) // BLOCK)
    copied = data[source : source + 2 * BLOCK]
    noise = rng.randbytes(BLOCK)
    new = rng.choice((b"", copied, noise, bytes(BLOCK), b"\xff" * BLOCK))
    return data[:target] + new + data[target + rng.choice((0, BLOCK)) :]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    offset = rng.randrange(len(data))
    return data[:offset] + rng.randbytes(rng.randrange(1, 40)) + data[offset:]


def change_header(data: bytes, offset: int, kind: str, rng: random.Random) -> bytes:
    """Changes the type, the size ("number") or any field of the header at an offset."""
    block = bytearray(data[offset : offset + BLOCK])
    if kind == "type":
        block[156] = rng.choice((*b"0123456789xXgLKSVMNDA\0", rng.randrange(256)))
    else:
        field = "size" if kind == "number" else rng.choice([*FIELDS])
        noise = rng.randbytes(FIELDS[field][1])
        write_field(block, field, rng.choice((*NUMBERS, noise)))
    changed = summed(block) if rng.random() < 0.9 else bytes(block)
    return data[:offset] + changed + data[offset + BLOCK :]


def drawn_members(kind: str, rng: random.Random) -> bytes:
    """Returns headers that describe the next member, whole or cut."""
    size = record(b"size", b"%d" % rng.randrange(4000))
    records = [rng.choice((*RECORDS, record(b"path", b"b.txt"), size))]
    if rng.random() < 0.3:
        count = rng.randrange(3)
        records += rng.choices(RECORDS, k=count)
    if kind == "pax":
        new = pax(*records, kind=rng.choice((b"x", b"X", b"g")))
    elif kind == "long":
        name = rng.randbytes(rng.randrange(6000))
        new = member("././@LongLink", name, rng.choice((b"L", b"K")))
    elif kind == "sparse":
        new = sparse(rng)
    else:
        new = pax(*records) * rng.randrange(2, 300)
    return new if rng.random() < 0.8 else cut(new, rng)


def sparse(rng: random.Random) -> bytes:
    """Returns a sparse member in GNU's older form, with further header blocks that may not end."""
    block = bytearray(header("s.png", rng.randrange(2000), b"S"))
    block[386:482] = b"".join(rng.choice(NUMBERS)[:12].ljust(12, b"\0") for _ in range(8))
    block[482] = rng.randrange(2)
    block[483:495] = rng.choice(NUMBERS).ljust(12, b"\0")
    count = rng.randrange(4)
    more = [rng.randbytes(504) + bytes([rng.randrange(2)]) + bytes(7) for _ in range(count)]
    return summed(block) + b"".join(more) + rng.randbytes(rng.randrange(4) * BLOCK)


ANYWHERE = {"bits": flip_bits, "cut": cut, "blocks": replace_blocks, "bytes": insert_bytes}
HEADERS = ("field", "type", "number")
MEMBERS = ("pax", "long", "sparse", "chain")
# in an order of their own, so that a case stays the same
MUTATIONS = ("bits", "field", "type", "pax", "long", "sparse", "cut", "blocks", "chain", "number")
MUTATIONS += ("bytes",)


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Mutates a tar. Returns the kind of mutation, and the result."""
    offset = rng.choice(header_offsets(data) or [0])
    kind = rng.choice(MUTATIONS)
    if kind in ANYWHERE:
        return kind, ANYWHERE[kind](data, rng)
    if kind in HEADERS:
        return kind, change_header(data, offset, kind, rng)
    return kind, data[:offset] + drawn_members(kind, rng) + data[offset:]


def case(number: int) -> tuple[str, bytes, dict[str, bytes] | None]:
    """Returns case `number`: (description, bytes of a tar, its files if the tar is intact)."""
    rng = random.Random(f"archive/{number}")
    data, files = intact_tar(rng)
    kinds: list[str] = []
    while rng.random() < (0.3 if kinds else 0.85):
        kind, data = mutated(data, rng)
        kinds.append(kind)
        if len(data) < BLOCK:
            break
    if rng.random() < 0.1:
        data = gzip.compress(data, 1, mtime=0)
        kinds.append("compressed")
    return f"case {number}: {'+'.join(kinds) or 'whole'}", data, None if kinds else files


def npy_that_claims(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """Returns an .npy file whose header names a shape that its data need not have."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-len(text) - 11 % 64 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
