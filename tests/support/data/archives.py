"""Tars that nobody would write: headers by hand, and mutations, each made from the number of its
case.
"""

import contextlib
import gzip
import io
import random
import signal
import tarfile
import time

from support.data.pairs import png

BLOCK = tarfile.BLOCKSIZE
PNG = png()
# Fields of a header: place and length.
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "magic": (257, 8),
    "prefix": (345, 155),
}
NUMBERS = (
    b"-0000000001\0",
    b"-1\0",
    b"+7\0",
    b"0o17\0",
    b"1_0\0",
    b"8\0",
    b"abc\0",
    b" \0",
    b"\0",
    b"7" * 12,
    b"0" * 12,
    b"\x80" + b"\0" * 10 + b"\x05",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\xff" + b"\0" * 11,
    b"\x80\0\0\0\x7f" + b"\xff" * 7,
    b"00000000644 ",
    b"\x81" + b"\0" * 11,
    b"00000001000\0",
    b"77777777777\0",
    "\u0663".encode() + b"\0",
)
RECORDS = (
    b"0 path=a\n",
    b"0 size=5\n",
    b"9z path=a\n",
    b"-5 path=a\n",
    b"12 size=abc\n",
    b"11 size=-5\n",
    b"9 size=5\n",
    b"8 size=5\n",
    b"14 size=99999\n",
    b"10 path=a\n",
    b"9 path=\n",
    b"13 path=a.txt\n",
    b"18 path=../../a.b\n",
    b"13 path=/a.tx\n",
    b"14 path=a\0.txt\n",
    b"12 path=\xff.jp\n",
    b"99999999999999999999 path=a\n",
    b"9" * 5000 + b" path=a\n",
    b"9999 path=a\n",
    b"29 size=9223372036854775808888\n",
    b"1_3 path=a.txt\n",
    b"22 GNU.sparse.major=1\n",
    b"22 GNU.sparse.minor=0\n",
    b"24 GNU.sparse.map=0,5,9\n",
    b"29 GNU.sparse.size=9999999999\n",
    b"25 GNU.sparse.name=a.png\n",
    b"13 path=a.txt\0",
    b"path=a",
    b"=path=size=",
    b" ",
    b"18 SCHILY.x=\xc3\x28\xff\n",
    b"17 mtime=1.5e400\n",
    b"5000 path=" + b"a/" * 2490 + b"\n",
    b"21 hdrcharset=BINARY\n",
)


class Endless(BaseException):
    """The error for reading that takes too long.

    It is no Exception, which a reader might take for damage.
    """


@contextlib.contextmanager
def in_time(seconds, what=""):
    """Context that raises Endless after so many seconds of CPU time."""

    def interrupt(number, frame):
        raise Endless(what)

    former, began = signal.signal(signal.SIGPROF, interrupt), time.process_time()
    # what ends by itself before is judged below
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
    if time.process_time() - began > seconds:
        raise Endless(what)


def header(name="a.png", size=0, kind=b"0", **fields):
    """Returns a header with these bytes in its fields, and with a fitting checksum unless one is
    given.
    """
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT))
    fields = {"name": name.encode("utf-8", "surrogateescape"), "type": kind} | fields
    if isinstance(size, int):
        size = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    fields["size"] = size
    for field, value in fields.items():
        place, length = FIELDS[field]
        block[place : place + length] = value[:length].ljust(length, b"\0")
    return bytes(block) if "checksum" in fields else summed(block)


def summed(block):
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def member(name, data, kind=b"0", **fields):
    return header(name, kind=kind, **{"size": len(data)} | fields) + padded(data)


def pax(*records, kind=b"x"):
    return member("pax", b"".join(records), kind)


def record(key, value):
    """Returns a whole record of a pax header."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + next(n for n in range(1, 9) if len(str(len(rest) + n)) == n)
    return str(length).encode() + rest


def pair(number, image=PNG, text=b"a caption"):
    return member(f"k{number}.png", image) + member(f"k{number}.txt", text)


END = bytes(2 * BLOCK)


def whole(draw):
    """Returns a tar as programs write it, and its files: name -> content."""
    files, out = {}, io.BytesIO()
    kind = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for number in range(draw.randrange(1, 6)):
            key = draw.choice(
                (f"k{number}", f"d/k{number}", f"{'x' * draw.randrange(20, 90)}/k{number}")
            )
            if kind != tarfile.USTAR_FORMAT:
                key = draw.choice(
                    (key, f"ключ{number}", f"{'y' * draw.randrange(95, 300)}{number}")
                )
            for suffix, data in {
                "png": PNG,
                "txt": b"a caption",
                "json": b'{"group": 1}',
                "cls": b"3",
                "bin": None,
            }.items():
                if draw.random() < 0.7:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    data = draw.randbytes(draw.randrange(0, 3000)) if data is None else data
                    info.size, info.mtime = len(data), draw.choice((0, 1.5))
                    files[info.name] = data
                    tar.addfile(info, io.BytesIO(data))
            if draw.random() < 0.2:
                info = tarfile.TarInfo(f"other{number}")
                info.type = draw.choice((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE))
                info.linkname = "k0.png"
                tar.addfile(info)
    return out.getvalue(), files


def headers(data):
    """Returns the offsets of a tar's headers."""
    return [
        place for place in range(0, len(data), BLOCK) if data[place + 257 : place + 262] == b"ustar"
    ]


def mutated(data, draw):
    """Mutates a tar. Returns the kind of mutation, and the result."""
    places = headers(data) or [0]
    place = draw.choice(places)
    kind = draw.choice(
        (
            "bits",
            "field",
            "type",
            "pax",
            "long",
            "sparse",
            "cut",
            "blocks",
            "chain",
            "number",
            "bytes",
        )
    )
    if kind == "bits":
        data = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "blocks":
        at, length = (BLOCK * draw.randrange(len(data) // BLOCK) for _ in range(2))
        new = draw.choice(
            (b"", data[at : at + 2 * BLOCK], draw.randbytes(BLOCK), bytes(BLOCK), b"\xff" * BLOCK)
        )
        data = data[:length] + new + data[length + draw.choice((0, BLOCK)) :]
    elif kind == "bytes":
        at = draw.randrange(len(data))
        data = data[:at] + draw.randbytes(draw.randrange(1, 40)) + data[at:]
    elif kind in ("field", "type", "number"):
        block = bytearray(data[place : place + BLOCK])
        if kind == "type":
            block[156] = draw.choice((*b"0123456789xXgLKSVMNDA\0", draw.randrange(256)))
        else:
            at, length = FIELDS["size" if kind == "number" else draw.choice([*FIELDS])]
            block[at : at + length] = draw.choice((*NUMBERS, draw.randbytes(length)))[
                :length
            ].ljust(length, b"\0")
        data = (
            data[:place]
            + (summed(block) if draw.random() < 0.9 else bytes(block))
            + data[place + BLOCK :]
        )
    else:
        records = [
            draw.choice(
                (*RECORDS, record(b"path", b"b.txt"), record(b"size", b"%d" % draw.randrange(4000)))
            )
        ]
        records += draw.choices(RECORDS, k=draw.randrange(3)) if draw.random() < 0.3 else []
        new = {
            "pax": lambda: pax(*records, kind=draw.choice((b"x", b"X", b"g"))),
            "long": lambda: member(
                "././@LongLink", draw.randbytes(draw.randrange(6000)), draw.choice((b"L", b"K"))
            ),
            "sparse": lambda: sparse(draw),
            "chain": lambda: pax(*records) * draw.randrange(2, 300),
        }[kind]()
        new = new if draw.random() < 0.8 else new[: draw.randrange(len(new))]
        data = data[:place] + new + data[place:]
    return kind, bytes(data)


def sparse(draw):
    """Returns a sparse member in GNU's older form, with further header blocks that may not end."""
    block = bytearray(header("s.png", draw.randrange(2000), b"S"))
    block[386:482] = b"".join(draw.choice(NUMBERS)[:12].ljust(12, b"\0") for _ in range(8))
    block[482], block[483:495] = draw.randrange(2), draw.choice(NUMBERS).ljust(12, b"\0")
    more = [
        draw.randbytes(504) + bytes([draw.randrange(2)]) + bytes(7)
        for _ in range(draw.randrange(4))
    ]
    return summed(block) + b"".join(more) + draw.randbytes(draw.randrange(4) * BLOCK)


def case(number):
    """Returns case `number`: (description, bytes of a tar, its files if the tar is intact)."""
    draw = random.Random(f"archive/{number}")
    data, files = whole(draw)
    done = []
    while draw.random() < (0.85 if not done else 0.3):
        kind, data = mutated(data, draw)
        done, files = [*done, kind], None
        if len(data) < BLOCK:
            break
    if draw.random() < 0.1:
        data = gzip.compress(data, 1, mtime=0)
        done, files = [*done, "compressed"], None
    return f"case {number}: {'+'.join(done) or 'whole'}", data, files


def npy_that_claims(shape, data=b""):
    """Returns an .npy file whose header names a shape that its data need not have."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-len(text) - 11 % 64 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
