"""Malicious archives and features: none hangs, writes outside its folder or takes much memory."""

import contextlib
import mmap
import os
import resource

import numpy as np
import pytest

from simplclip import data
from simplclip.data import read_tars
from support.data import archives as make
from support.data.archives import END, PNG, header, member, npy_that_claims, pair, pax, record
from support.data.pairs import npy, one_pass, resize, write
from support.evaluation import batches_of

DAMAGED = "damaged tar"
LARGE = "file too large"
SPARSE = "sparse file"
GIB = 1 << 30


def after(part):
    """Returns a tar with a sample, the given part, and another sample."""
    return pair(1) + part + pair(2) + END


def members(names, content):
    return b"".join(member(name, content) for name in names)


def new_sparse(*records):
    """Returns a sparse file of 1 TiB with one block of data."""
    return pax(*(record(b"GNU.sparse." + key, value) for key, value in records)) + member(
        "k3.png", b"1\n0\n5\n".ljust(512, b"\0")
    )


# name -> what follows a sample and ends the tar as damage
DAMAGED_TARS = {
    "a size beyond the end": lambda: header("k3.png", 1 << 20),
    "a pax header of 4 GiB": lambda: header("pax", 4 * GIB, b"x"),
    "pax headers without end": lambda: pax(record(b"path", b"k3.png")) * 9999,
}
OUTSIDE = [f"{way}{end}" for way in ("/tmp/out", "../../out") for end in (".png", ".json")]
OWN_FIELDS = [f"k3.__{name}__" for name in ("url", "shard", "key", "copy")]
TAGS = ((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"%d" % 2**40))
# name -> (what stands between two samples that are used, the counts of damage)
PASSED_OVER = {
    "a sparse file": (lambda: header("k3.png", kind=b"S") + member("k3.txt", b"x"), {SPARSE: 1}),
    "a sparse file of pax 1.0": (lambda: new_sparse(*TAGS), {SPARSE: 1}),
    "names that lead out": (lambda: members(OUTSIDE, PNG), {"bad json": 2}),
    "names of a sample's own fields": (lambda: members(OWN_FIELDS, b"x"), {}),
    "a caption of 17 MiB": (
        lambda: member("k3.txt", bytes(17 << 20)) + member("k3.png", PNG),
        {LARGE: 1},
    ),
    "json of brackets": (
        lambda: member("k3.json", b"[" * 10**6) + member("k3.png", PNG),
        {"bad json": 1},
    ),
}
NO_UTF8 = "\udcff\udcfe"
# name -> (what stands between two samples, the keys of those that are used, the counts of damage)
ARCHIVES = {
    **{name: (part, [1], {DAMAGED: 1}) for name, part in DAMAGED_TARS.items()},
    **{name: (part, [1, 2], counts) for name, (part, counts) in PASSED_OVER.items()},
    "names that are not UTF-8": (
        lambda: member(f"{NO_UTF8}.png", PNG) + member(f"{NO_UTF8}.txt", b"x"),
        [1, NO_UTF8, 2],
        {},
    ),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(read_tars, "RETRIES", ())


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
        # of the system: malloc may have free memory of an earlier test
        with pytest.raises(OSError, match="memory"):
            mmap.mmap(-1, room + (64 << 20))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_training_and_evaluation_read_what_they_can_and_count_the_rest(tmp_path, name):
    (tmp_path / "good.tar").write_bytes(pair(0) + END)
    path = tmp_path / "bad.tar"
    part, used, counted = ARCHIVES[name]
    path.write_bytes(after(part()))
    used = [f"k{key}" if isinstance(key, int) else key for key in used]
    there = {*tmp_path.iterdir(), *tmp_path.parent.iterdir()}
    with in_memory():
        for shard in (str(path), f"pipe:cat {path}"):
            shards = [str(tmp_path / "good.tar"), shard]
            found, skipped = one_pass(shards)
            assert found == ["k0", *used]
            assert skipped.counts == counted
            assert all("bad.tar" in example for example in skipped.examples.values())
            batches, skipped = batches_of(data.held_out(shards), resize, 4)
            assert [row.key for batch in batches for row in batch.rows] == found
            assert skipped.counts == counted
    assert {*tmp_path.iterdir(), *tmp_path.parent.iterdir()} == there
    assert not os.path.exists("/tmp/out.png")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_gibibyte_is_not_read_into_memory(tmp_path, form):
    """Nothing of a file that is too large is held; a stream may promise what never comes."""
    path = tmp_path / "bomb.tar"
    shard = str(path) if form == "file" else f"pipe:cat {path}"
    with open(path, "wb") as file:
        file.write(pair(1) + header("k3.png", GIB))
        file.seek(GIB, os.SEEK_CUR)
        file.write(member("k3.txt", b"x") + pair(2) + END)
    with in_memory(100 << 20):
        found, skipped = one_pass(shard)
        assert found == ["k1", "k2"]
        assert skipped.counts == {LARGE: 1}
        assert "png of 1,073,741,824 bytes, expected at most 268,435,456" in skipped.examples[LARGE]
        path.write_bytes(pair(1) + header("k3.png", 1 << 49))
        found, skipped = one_pass(shard)
        assert (found, skipped.counts) == (["k1"], {DAMAGED: 1})


def test_the_limit_of_a_file_can_be_set(tmp_path):
    """As file and stream; one file is exactly as large as the limit."""
    path, big = tmp_path / "a.tar", PNG + bytes(3000 - len(PNG))
    files = {"png": big, "txt": b"x"}, {"png": PNG, "txt": b"x" * 3001}, {"png": big + b"x"}
    write(path, zip("abc", files))
    for shard in (str(path), f"pipe:cat {path}"):
        found, skipped = one_pass(shard, max_bytes=3000)
        assert (found, skipped.counts) == (["a"], {LARGE: 2})
        assert "a.tar/b: b.txt of 3,001 bytes, expected at most 3,000" in skipped.examples[LARGE]


# name -> a teacher's features in a sidecar
FEATURES = {
    "of 10**12 numbers": lambda: npy_that_claims((10**6, 10**6)),
    "of fewer numbers than none": lambda: npy_that_claims((-2, 8), bytes(32)),
    "pickled": lambda: npy(np.array([[print, 1]], object)),
    "of other numbers": lambda: npy(np.zeros((2, 8))),
    "an archive": lambda: b"PK\x03\x04" + bytes(99),
    "cut": lambda: npy(np.zeros((2, 8), np.float16))[:40],
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_teachers_features_that_promise_too_much(tmp_path, name):
    good = npy(np.zeros((2, 8), np.float16))
    each = {"a": good, "b": FEATURES[name](), "c": good}
    samples = [(key, {"png": PNG, "txt": b"x", "teacher.npy": each[key]}) for key in each]
    with in_memory():
        found, skipped = one_pass(write(tmp_path / "a.tar", samples), teacher=True)
    assert (found, skipped.counts) == (["a", "c"], {"bad teacher features": 1})


@pytest.mark.parametrize("about", [b"[]", b"{", b'{"views": 5}'])
def test_accounts_of_features_that_are_none(tmp_path, about):
    features = npy(np.zeros((2, 8), np.float16))
    bad = {"png": PNG, "txt": b"x", "teacher.npy": features, "teacher.json": about}
    good = bad | {"teacher.json": b"{}"}
    found, skipped = one_pass(write(tmp_path / "a.tar", [("a", good), ("b", bad)]), teacher=True)
    assert (found, skipped.counts) == (["a"], {"bad teacher features": 1})
