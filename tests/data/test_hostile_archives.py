"""Malicious archives, sidecars, indices and files of features, and the expected result for each.

Training, evaluation, report, index and shrink read them as files and as streams. None of these hangs, writes outside its
folder or takes much memory.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import resource
import warnings
import zipfile
import zlib
from collections import Counter

import archives as make
import numpy as np
import pytest
from archives import END, PNG, header, member, npy, pair, pax, record
from pairs import call, keys, loader, resize, write

from simplclip import data
from simplclip.data import build_index, index, parts, report, shrink
from simplclip.data.arrays import from_bytes
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.shards import contents, read_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
TORN, CLOSED, LARGE, SPARSE, TWICE = "torn tar", "unreadable shard", "file too large", "sparse file", "duplicate file in tar"
OF_TARS = (TORN, TWICE)  # counts of tars, not of samples
GIB = 1 << 30


def after(*parts, then=True):
    """Returns a tar with a sample, the given parts, and another sample."""
    return pair(1) + b"".join(parts) + (pair(2) if then else b"") + END


def old_sparse(more):
    """Returns a file of the older form whose map has `more` further blocks; each but the last is marked as continued."""
    block = bytearray(header("k3.png", 512, b"S"))
    block[386:410] = block[483:495] + block[483:495]
    block[482], block[483:495] = more > 0, b"77777777777\0"
    further = [bytes(504) + bytes([place < more - 1]) + bytes(7) for place in range(more)]
    return make.summed(block) + b"".join(further) + bytes(512)


def new_sparse(*records):
    """Returns a sparse file of 1 TiB with one block of data."""
    return pax(*(record(b"GNU.sparse." + key, value) for key, value in records)) + member(
        "k3.png", b"1\n0\n5\n".ljust(512, b"\0")
    )


def bomb(size, piece=64 << 20):
    """Returns a .tar.gz, a thousandth as long as the `size` zeros of its file, which lies between two samples."""
    head, tail, deflate = (
        pair(1) + header("k3.png", size),
        member("k3.txt", b"x") + pair(2) + END,
        zlib.compressobj(9, wbits=-15),
    )
    first = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    zeros, crc = bytes(piece), zlib.crc32(head)
    block = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size // piece):
        crc = zlib.crc32(zeros, crc)
    trailer = zlib.crc32(tail, crc).to_bytes(4, "little") + ((len(head) + size + len(tail)) % 2**32).to_bytes(4, "little")
    return (
        b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + first + block * (size // piece) + deflate.compress(tail) + deflate.flush() + trailer
    )


# name -> (a tar, the keys of the samples that are used, the counts of damage)
ARCHIVES = {
    "a size below zero": (lambda: after(header("k3.png", b"-0000001000\0")), [1], {TORN: 1}),
    "a binary size below zero": (lambda: after(header("k3.png", b"\xff" * 11 + b"\0")), [1], {TORN: 1}),
    "a size below zero at the start": (lambda: header("k3.png", b"-0000001000\0") + END, [], {CLOSED: 1}),
    "a size above 2**63": (lambda: after(header("k3.png", b"\x80\0\0\0\x7f" + b"\xff" * 7)), [1], {TORN: 1}),
    "a size of Python's": (lambda: after(header("k3.png", b"1_000\0")), [1], {TORN: 1}),
    "a size beyond the end": (lambda: after(header("k3.png", 1 << 20)), [1], {TORN: 1}),
    "a checksum below zero": (lambda: after(header("k3.png", checksum=b"-17777\0")), [1], {TORN: 1}),
    "a pax record of length 0": (lambda: after(pax(b"0 path=k3.png\n")), [1], {TORN: 1}),
    "a pax record of no length": (lambda: after(pax(b"9z path=a\n")), [1], {TORN: 1}),
    "a pax record of 5,000 digits": (lambda: after(pax(b"1" * 5000 + b" path=a\n")), [1], {TORN: 1}),
    "a pax size of letters": (lambda: after(pax(record(b"size", b"abc"))), [1], {TORN: 1}),
    "a pax size below zero": (lambda: after(pax(record(b"size", b"-512"))), [1], {TORN: 1}),
    "a pax size of 5,000 digits": (lambda: after(pax(record(b"size", b"9" * 5000))), [1], {TORN: 1}),
    "a pax header of 4 GiB": (lambda: after(header("pax", 4 * GIB, b"x")), [1], {TORN: 1}),
    "a long name of 4 GiB": (lambda: after(header("././@LongLink", 4 * GIB, b"L")), [1], {TORN: 1}),
    "a long name of folders": (lambda: after(member("l", b"a/" * 400000 + b"b.c/.png", b"L")), [1], {TORN: 1}),
    "pax headers without end": (lambda: after(pax(record(b"path", b"k3.png")) * 9999), [1], {TORN: 1}),
    "pax headers for all": (lambda: after(pax(record(b"size", b"7"), record(b"path", b"k3.png"), kind=b"g")), [1, 2], {}),
    "a sparse file": (lambda: after(old_sparse(0), member("k3.txt", b"x")), [1, 2], {SPARSE: 1}),
    "a sparse file with a long map": (lambda: after(old_sparse(9000), member("k3.txt", b"x")), [1, 2], {SPARSE: 1}),
    "a sparse file, its map cut": (lambda: pair(1) + old_sparse(9)[:3000], [1], {TORN: 1}),
    "a sparse file of pax 0.0": (
        lambda: after(new_sparse((b"size", b"1099511627776"), (b"offset", b"0"), (b"numbytes", b"5"))), [1, 2], {SPARSE: 1}
    ),
    "a sparse file of pax 0.1": (lambda: after(new_sparse((b"size", b"%d" % 2**40), (b"map", b"0,5"))), [1, 2], {SPARSE: 1}),
    "a sparse file of pax 1.0": (
        lambda: after(new_sparse((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"%d" % 2**40))), [1, 2], {SPARSE: 1}
    ),
    "names that lead out": (
        lambda: after(*(member(f"{way}{s}", PNG) for way in ("/tmp/out", "../../out") for s in (".png", ".json"))),
        [1, 2], {"bad json": 2},
    ),
    "a name with a zero": (
        lambda: after(pax(record(b"path", b"k3.png\0/x")), member("a", PNG)), [1, 2], {"missing caption": 1}
    ),
    "names that are not UTF-8": (
        lambda: after(member("\udcff\udcfe.png", PNG), member("\udcff\udcfe.txt", b"x")), [1, "\udcff\udcfe", 2], {}
    ),
    "names of a sample's own fields": (
        lambda: after(*(member(f"k3.{name}", b"x") for name in ("__url__", "__shard__", "__key__", "__copy__"))), [1, 2], {}
    ),
    "a file twice": (lambda: after(member("k2.png", PNG)), [1, 2], {TWICE: 1}),
    "many empty files": (lambda: after(*(header(f"{i:05d}.jpg") for i in range(4000))), [1, 2], {"missing caption": 4000}),
    "a caption of 17 MiB": (lambda: after(member("k3.txt", bytes(17 << 20)), member("k3.png", PNG)), [1, 2], {LARGE: 1}),
    "json of brackets": (lambda: after(member("k3.json", b"[" * 10**6), member("k3.png", PNG)), [1, 2], {"bad json": 1}),
    "an image of 260 MiB in gzip": (lambda: bomb(272 << 20, 16 << 20), [1, 2], {LARGE: 1}),
    "bzip2 of zeros": (lambda: bz2.compress(after(header("k3.png", 260 << 20), bytes(260 << 20)), 9), [1, 2], {LARGE: 1}),
    "half of a gzip": (lambda: gzip.compress(after(member("k3.png", os.urandom(9999))))[:5000], [1], {TORN: 1}),
    "a gzip of noise": (lambda: b"\x1f\x8b\x08" + os.urandom(999), [], {CLOSED: 1}),
    "xz that wants 1.5 GiB": (
        lambda: xz_of(3 << 29), [], {CLOSED: 1}
    ),
    "two bzip2 in a row": (lambda: bz2.compress(after()[:700]) + bz2.compress(after()[700:]), [1, 2], {}),
    "an empty file": (lambda: b"", [], {CLOSED: 1}),
    "a page": (lambda: b"<html>" * 999, [], {CLOSED: 1}),
}  # fmt: skip


def xz_of(size):
    """Returns a small .xz whose header asks for a dictionary of at least this size, with a fitting checksum."""
    data = bytearray(lzma.compress(after(), preset=0))
    place = data.index(b"\x21\x01", 12)
    data[place + 2] = next(bits for bits in range(41) if (2 | bits & 1) << (bits // 2 + 11) >= size)
    end = 12 + 4 * (data[12] + 1) - 4
    data[end : end + 4] = zlib.crc32(data[12:end]).to_bytes(4, "little")
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("hostile")
    for number, (build, _, _) in enumerate(ARCHIVES.values()):
        (found / f"{number:02d}.tar").write_bytes(build())
    (found / "good.tar").write_bytes(pair(0) + END)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(parts, "RETRIES", ())


@pytest.fixture(autouse=True)
def in_time():
    with make.in_time(60):
        yield


@contextlib.contextmanager
def in_memory(room=600 << 20):
    """Context in which this process may take at most `room` bytes more than before."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, former[1]))
    try:
        with pytest.raises(MemoryError):
            bytearray(room + (64 << 20))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def sample_keys(used):
    return [f"k{key}" if isinstance(key, int) else key for key in used]


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("form", ["file", "stream"])
def test_training_reads_what_it_can_and_counts_the_rest(folder, form, name):
    path = folder / f"{[*ARCHIVES].index(name):02d}.tar"
    _, used, counted = ARCHIVES[name]

    with in_memory():
        shard = f"pipe:cat {path}" if form == "stream" else str(path)
        reader = loader([str(folder / "good.tar"), shard], transform=resize, batch_size=1, shuffle=False)
        assert keys(reader.epoch(0)) == ["k0", *sample_keys(used)]
        assert reader.skipped == counted
        assert not counted or path.name in reader.report()
        assert not name.startswith("xz") or "limit" in reader.report()


@pytest.mark.slow
def test_evaluation_report_index_and_shrink(folder, tmp_path, monkeypatch):
    """All archives are read together; nothing is written outside of the given folders."""
    paths = {str(folder / f"{number:02d}.tar"): rest for number, (_, *rest) in enumerate(ARCHIVES.values())}
    opened = {path: rest for path, rest in paths.items() if CLOSED not in rest[1]}
    there = {*folder.iterdir(), *tmp_path.parent.iterdir()}
    sums = Counter()
    for _, counted in opened.values():
        sums.update(counted)
    monkeypatch.setenv(index.FOLDER, str(tmp_path))
    for what in ("headers", "indices"):
        with in_memory():
            skipped = Skipped()
            batches = data.held_out([*opened]).batches(resize, 4, skipped)
            found = [entry.key for _, _, entries in batches for entry in entries]
            assert found == [key for used, _ in opened.values() for key in sample_keys(used)]
            assert skipped.counts == sums
            for path, (used, counted) in paths.items():
                summary = report.summarise(*data.parts_of(str(path)))
                if path not in opened:
                    assert "cannot be opened" in summary
                    continue
                assert (summary.broken.counts, bool(summary.sums["indexed"])) == (counted, what == "indices"), path
                assert summary.sums["samples"] == len(used) + sum(n for reason, n in counted.items() if reason not in OF_TARS)
                if what == "headers":
                    index.write(index.paths(path)[1], *build_index.inspect_shard(path))
    shrink.run([*opened], tmp_path / "small", short=8, workers=1, progress=False)
    splits = json.loads((tmp_path / "small" / "meta.json").read_text())["splits"].values()
    skipped = [entry.get("skipped", {}) for split in splits for entry in split["shards"].values()]
    assert {reason: sum(one.get(reason, [0])[0] for one in skipped) for reason in sums} == sums
    assert {*folder.iterdir(), *tmp_path.parent.iterdir()} == there
    assert not os.path.exists("/tmp/out.png")


def test_names_that_no_terminal_takes(tmp_path):
    """Names of a tar and of a file in it are printed where the output is strict UTF-8, without escape sequences."""
    key, page = "\udcff\udcfe\n\x1b[31m", tmp_path / "\udcff.tar"
    (tmp_path / "a.tar").write_bytes(after(*(member(key + suffix, PNG[:50]) for suffix in (".png", ".txt"))))
    page.write_bytes(b"<html>" * 999)
    done = call("data", "index", "--decode", tmp_path / "a.tar", page, "--workers", "1")  # `call` has strict UTF-8 output
    assert done.exit_code == 0, done.output
    assert r"a.tar/\udcff\udcfe\n\x1b[31m" in done.stdout
    assert r"\udcff.tar" in done.output


@pytest.mark.slow
def test_a_gibibyte_in_a_mebibyte(tmp_path):
    """Nothing of a file that is too large is held, and later files are read."""
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(bomb(GIB))
    assert path.stat().st_size < 1.1 * 2**20
    with in_memory(100 << 20):
        found = {sample["__key__"]: sample for sample in read_shard(str(path), Skipped())}
        assert [*found] == ["k1", "k3", "k2"]
        contents(found["k1"])
        with pytest.raises(BrokenSample, match=LARGE) as raised:
            contents(found["k3"])
        assert raised.value.args[1] == "png of 1,073,741,824 bytes, expected at most 268,435,456"


def test_the_limit_is_of_a_sample_and_can_be_set(tmp_path):
    """As file and stream: two files of one key exceed the limit together; one file is exactly as large as the limit."""
    half, path = 3000, tmp_path / "a.tar"
    big = PNG + bytes(half - len(PNG))
    write(
        path, [("a", {"png": big, "txt": b"x"}), ("b", {"png": big, "txt": b"x" * half}), ("c", {"png": big, "txt": b"xy"})]
    )
    write(tmp_path / "d.tar", [("d", {"png": big, "txt": b"x"})])
    for shard in (str(path), f"pipe:cat {path}"):
        reader = loader([shard, str(tmp_path / "d.tar")], batch_size=1, transform=resize, shuffle=False, max_bytes=half + 1)
        assert keys(reader.epoch(0)) == ["a", "d"]
        assert reader.skipped == {LARGE: 2}
        assert "a.tar/b: txt of 3,000 bytes, with the sample's other files 6,000, expected at most 3,001" in reader.report()


# name -> a teacher's features in a sidecar, and the error
SIDECARS = {
    "of 10**12 numbers": (lambda: npy(descr="<f2", shape=(10**6, 10**6)), "expected 2,000,000,000,000 bytes"),
    "of fewer numbers than none": (lambda: npy(descr="<f2", shape=(-2, 8), data=bytes(32)), "expected an array of numbers"),
    "pickled": (lambda: npy(np.array([[print, 1]], object)), "expected an array of numbers"),
    "of other numbers": (lambda: npy(np.zeros((2, 8))), "expected float16 or uint16"),
    "of a newer format": (lambda: b"\x93NUMPY\x03\x00" + bytes(99), "version 1.0"),
    "an archive": (lambda: b"PK\x03\x04" + bytes(99), "magic string"),
    "cut": (lambda: npy(np.zeros((2, 8), np.float16))[:40], "expected"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_teachers_features_that_promise_too_much(tmp_path, name):
    build, told = SIDECARS[name]
    good = npy(np.zeros((2, 8), np.float16))
    samples = [
        (key, {"png": PNG, "txt": b"x", "teacher.npy": data}) for key, data in (("a", good), ("b", build()), ("c", good))
    ]
    path = write(tmp_path / "a.tar", samples)

    with in_memory():
        for shard in (path, f"pipe:cat {path}"):
            reader = loader(shard, batch_size=1, transform=resize, shuffle=False, teacher=True)
            assert keys(reader.epoch(0)) == ["a", "c"]
            assert reader.skipped == {"bad teacher features": 1}
            assert told in reader.report()


def bomb_of_names(archive):
    archive.writestr("names.npy", npy(descr="|u1", shape=(GIB // 4,), data=bytes(GIB // 4)), zipfile.ZIP_DEFLATED, 1)


# name -> a change of an index: of its text, of its arrays, or of the archive
INDICES = {
    "samples without number": {"about": {"samples": 10**30}},
    "fewer samples than none": {"about": {"samples": -1}},
    "a reason of a number": {"about": {"torn": 5}},
    "an object that is none": {"about": {"shard": None}},
    "skipped without a count": {"about": {"skipped": {"a": ["b", 1]}}},
    "text of brackets": {"text": b"[" * 100000},
    "places below zero": {"arrays": {"offset": np.array([-512, 512, 1024, 1536])}},
    "places that overflow": {"arrays": {"offset": np.full(4, 2**63 - 1), "size": np.full(4, 2**62)}},
    "places of floats": {"arrays": {"offset": np.zeros(4)}},
    "pickled places": {"arrays": {"offset": np.array([print] * 4, object)}},
    "sizes below zero": {"arrays": {"size": np.full(4, -2)}},
    "one name": {"arrays": {"names": np.frombuffer(b"a.png", "u1")}},
    "names of zeros": {"arrays": {"names": np.zeros(1 << 20, "u1")}},
    "no names": {"without": "names"},
    "a bomb of names": {"archive": bomb_of_names},
    "names of bzip2": {"archive": lambda archive: archive.writestr("names.npy", npy(np.zeros(9, "u1")), zipfile.ZIP_BZIP2)},
    "10**12 captions": {"archive": lambda archive: archive.writestr("captions.npy", npy(shape=(10**12,)))},
    "an unknown format": {"arrays": {"format": np.array([9, -1], np.int32)}},
    "images below zero": {"arrays": {"height": np.array([-9, -9], np.int32)}},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_cannot_be_is_not_used(tmp_path, name):
    shard = str(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(pair(1) + pair(2) + END)
    about, arrays = build_index.inspect_shard(shard)
    change = INDICES[name]
    text = change.get("text") or json.dumps({"format": index.FORMAT} | about | change.get("about", {})).encode()
    parts = {"about": np.frombuffer(text, "u1")} | arrays | change.get("arrays", {})
    with zipfile.ZipFile(index.paths(shard)[0], "w") as archive, warnings.catch_warnings():
        for part, array in parts.items():
            if part != change.get("without"):
                archive.writestr(f"{part}.npy", npy(array))
        warnings.simplefilter("ignore")  # zipfile warns of a name that occurs twice
        change.get("archive", lambda archive: None)(archive)

    with in_memory():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [(s["__key__"], contents(s)["png"]) for s in read_shard(shard, Skipped())]
            summary = report.summarise(*data.parts_of(shard))
        assert found == [("k1", PNG), ("k2", PNG)]
        assert (summary.sums["samples"], summary.formats) == (2, {"png": 2})
        assert said
        assert not any("MemoryError" in str(one.message) or "allocate" in str(one.message) for one in said)
        assert all(f"{shard}{index.SUFFIX} is not used" in str(one.message) for one in said)


# name -> changed members of a file of features
@pytest.mark.parametrize("array", [np.zeros((0, 3), "f2"), np.arange(6.0).reshape(2, 3), np.array("ü")], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_is_read(array, order):
    array = np.asarray(array, order=order)
    assert np.array_equal(from_bytes(npy(array)), array)
