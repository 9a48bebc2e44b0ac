"""Indices of shards: they hold what the tars hold, are found, and are not used when they do not fit."""

import bz2
import functools
import io
import os
import shutil
import time
import warnings

import kills
import numpy as np
import pytest
import torch
from pairs import SIZE, call, keys, loader, one_line, png, sample, write
from photos import encode, photo

from simplclip.common.files import locked
from simplclip.data import build_index, index, shards, tar
from simplclip.data.broken import Skipped
from simplclip.data.shards import read_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def make(patterns, **options):
    return build_index.run(patterns, workers=1, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """Writes two shards with all that tars may hold: unicode and long names, upper case, other files, duplicates, damage."""
    odd = [
        ("grün/ключ", {"JPG": encode(photo(0, (40, 60))), "txt": b"ein Bild", "seg.png": png(3)}),
        ("long/" + "x" * 150, {"webp": png(1, (30, 20), "WEBP"), "json": b'{"captions": ["two words", "three", ""]}'}),
        ("twice", {"png": png(2), "txt": b"first"}),
        ("twice", {"txt": b"second"}),
        ("alone", {"cls": b"1"}),
        ("cut", {"png": png(3, (64, 64))[:2000], "txt": b"cut"}),
        ("page", {"jpg": b"<html>", "txt": b"no image"}),
        ("mute", {"png": png(4)}),
    ]
    write(tmp_path / "odd-0.tar", odd)
    write(tmp_path / "plain-0.tar", [sample(i) for i in range(12)])
    return tmp_path


def without(monkeypatch):
    """Makes reading of headers fail from now on."""

    def no_headers(*arguments, **options):
        raise AssertionError("a header was read")

    monkeypatch.setattr(tar, "members", no_headers)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_the_samples_of_an_index_are_those_of_the_headers(folder, monkeypatch, every, torn):
    path = str(folder / "odd-0.tar")
    if torn:
        os.truncate(path, max(span.offset for _, span in tar.members(path)) + 10)
    counted = Skipped()
    before = list(read_shard(path, counted, every=every))
    assert counted.counts["duplicate file in tar"] == 1
    assert counted.counts["torn tar"] == torn
    make(path)
    without(monkeypatch)
    for ahead in (False, True):
        damage = Skipped()
        assert list(read_shard(path, damage, every=every, ahead=ahead)) == before
        assert (damage.counts, damage.examples) == (counted.counts, counted.examples)


def test_what_an_index_says(folder):
    found = make(folder / "odd-0.tar")
    entry = index.load(str(folder / "odd-0.tar"))
    assert entry.keys() == ["grün/ключ", "long/" + "x" * 150, "twice", "cut", "page", "mute"]
    columns = dict(zip(index.SAMPLE, map(np.ndarray.tolist, entry.arrays(*index.SAMPLE))))
    assert columns["width"] == [60, 20, 12, 64, 0, 0]
    assert columns["height"] == [40, 30, 12, 64, 0, 0]
    assert [entry.about["formats"][i] for i in columns["format"][:4]] == ["jpeg", "webp", "png", "png"]
    assert columns["bytes"][3:5] == [2000, 6]
    assert columns["captions"] == [1, 2, 1, 1, 1, 0]
    assert entry.arrays("characters")[0].tolist() == [8, 9, 5, 5, 3, 8]
    assert [entry.about["reasons"][i - 1] if i else None for i in columns["broken"]] == [
        None, None, None, None, "not an image", "missing caption",
    ]  # fmt: skip
    assert found["samples"] == entry.samples == 6
    assert found["broken"].counts == {"duplicate file in tar": 1, "not an image": 1, "missing caption": 1}
    file = io.BytesIO()
    photo(0, (40, 60)).save(file, "JPEG", icc_profile=b"\0" * (3 * build_index.HEAD))  # the size is far behind the start
    make(write(folder / "a.tar", [("a", {"jpg": file.getvalue(), "txt": b"one"})]))
    long = index.load(str(folder / "a.tar")).arrays("width", "height", "broken")
    assert [row.tolist() for row in long] == [[60], [40], [0]]
    decoded = make(folder / "odd-0.tar", decoded=True)
    assert decoded["broken"].counts == {**found["broken"].counts, "truncated image": 1}
    assert "odd-0.tar/cut" in decoded["broken"].examples["truncated image"]


def test_a_loader_with_indices_gives_the_same_batches_without_headers(folder, monkeypatch):
    shutil.copytree(folder, folder / "other")
    options = {"workers": 0, "batch_size": 3, "drop_last": False}
    plain = loader(str(folder / "other" / "*.tar"), **options)
    want = list(plain.epoch(0))
    make(str(folder / "*.tar"))
    without(monkeypatch)
    monkeypatch.setattr(shards, "COUNT_LIMIT", 0)
    fast = loader(str(folder / "*.tar"), **options)
    assert fast.batches_per_epoch == -(-18 // 3)  # the limit allows no reading of headers for the count
    for batch, same in zip(want, fast.epoch(0), strict=True):
        assert batch["key"] == same["key"]
        assert torch.equal(batch["image"], same["image"])
    assert fast.report() == plain.report()


def test_finished_indices_are_kept(folder, tmp_path_factory):
    pattern = str(folder / "*.tar")
    assert make(pattern)["written"] == 2
    before = kills.digests(folder)
    by_three = tmp_path_factory.mktemp("three")
    build_index.run(pattern, out=by_three, workers=3, progress=False)
    assert kills.digests(by_three).items() <= before.items()  # the bytes of an index do not depend on the number of processes
    (folder / ".former.tar.index.npz.tmp").write_bytes(b"left by a run that was killed")
    assert make(pattern)["written"] == 0
    assert kills.digests(folder) == before
    write(folder / "plain-0.tar", [sample(i) for i in range(5)])
    assert make(pattern)["written"] == 1
    assert kills.digests(folder)["odd-0.tar.index.npz"] == before["odd-0.tar.index.npz"]
    assert index.count(str(folder / "plain-0.tar")) == 5
    assert make(pattern, decoded=True)["written"] == 2  # existing indices lack what `decoded` adds
    assert make(pattern)["written"] == 0


@pytest.mark.parametrize("change", ["longer", "same length"])
def test_a_stale_index_is_named_and_not_used(folder, change):
    path = folder / "plain-0.tar"
    make(path)
    os.utime(path, (1, 1))  # a copy has another modification time
    assert index.count(str(path)) == 12
    size = path.stat().st_size
    write(path, [sample(i) for i in (range(1, 13) if change == "same length" else range(20))])
    assert (path.stat().st_size == size) == (change == "same length")
    why = "bytes, which has" if change == "longer" else "has changed since"
    with pytest.warns(UserWarning, match=f"plain-0.tar.index.npz is not used: .*{why}.*simplclip data index"):
        found = [s["__key__"] for s in read_shard(str(path), Skipped())]
    assert found == [f"k{i:03d}" for i in (range(1, 13) if change == "same length" else range(20))]
    with pytest.warns(UserWarning, match="not used"):
        assert shards.count_samples([str(path)]) == [len(found)]
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.count(str(path)) == len(found)


def pickled(path):
    np.savez(path, about=np.array([{"format": index.FORMAT}], dtype=object))


def outside(path):
    """Writes an index of the right shard with an offset behind the shard's end."""
    entry = index.load(str(path).removesuffix(index.SUFFIX))
    names, offset, size = entry.arrays("names", "offset", "size")
    index.write(path, entry.about, {"names": names, "offset": offset + (1 << 40), "size": size})


def of_another_version(path):
    index.write(path, {"format": "simplclip-index-0"}, {})


@pytest.mark.parametrize(
    "damage",
    [pickled, outside, of_another_version, lambda path: path.write_bytes(b"PK\3\4"), lambda path: path.write_bytes(b"")],
)
def test_a_damaged_index_is_named_and_not_used(folder, damage):
    path = folder / "plain-0.tar"
    make(path)
    damage(folder / "plain-0.tar.index.npz")
    with pytest.warns(UserWarning, match="plain-0.tar.index.npz is not used: "):
        assert len(list(read_shard(str(path), Skipped()))) == 12
    if damage is not outside:  # its counts are right
        assert make(path)["written"] == 1


def test_an_index_knows_no_other_file_and_those_of_earlier_versions_are_read(folder):
    """Whatever file names an index holds, samples are read from the shard beside the index."""
    make(folder / "plain-0.tar")
    path = folder / "plain-0.tar.index.npz"
    entry = index.load(str(folder / "plain-0.tar"))
    arrays = dict(zip(("names", "offset", "size"), entry.arrays("names", "offset", "size")))
    arrays |= entry.statistics() | {"tokens": np.full(36, 5, np.int32)}
    index.write(path, entry.about | {"url": "pipe:touch hacked", "tokens": True}, arrays)
    found = list(read_shard(str(folder / "plain-0.tar"), Skipped()))
    assert {span.file for s in found for suffix, span in s.items() if "__" not in suffix} == {str(folder / "plain-0.tar")}
    assert index.statistics(str(folder / "plain-0.tar"))[0]["samples"] == 12
    assert make(folder / "plain-0.tar")["written"] == 0


def test_compressed_shards_have_counts(folder, monkeypatch):
    path = folder / "plain-0.tar.bz2"
    path.write_bytes(bz2.compress((folder / "plain-0.tar").read_bytes()))
    make(path)
    monkeypatch.setattr(shards, "COUNT_LIMIT", 0)
    assert shards.count_samples([str(path)]) == [12]
    assert len(index.load(str(path)).arrays("offset")[0]) == 0
    assert keys(loader(str(path), shuffle=False, batch_size=12).epoch(0)) == [f"k{i:03d}" for i in range(12)]


def test_indices_in_another_folder(folder, tmp_path, monkeypatch):
    out = tmp_path / "indices"
    make(str(folder / "*.tar"), out=out)
    assert sorted(path.name for path in out.iterdir()) == ["odd-0.tar.index.npz", "plain-0.tar.index.npz"]
    assert not list(folder.glob("*.npz"))
    assert index.load(str(folder / "odd-0.tar")) is None
    monkeypatch.setenv("SIMPLCLIP_INDEX", str(out))
    without(monkeypatch)
    assert len(list(read_shard(str(folder / "odd-0.tar"), Skipped()))) == 6
    (folder / "sub").mkdir()
    write(folder / "sub" / "odd-0.tar", [sample(0)])
    with pytest.raises(ValueError, match="out: expected shards of different names"):
        make([str(folder / "odd-0.tar"), str(folder / "sub" / "odd-0.tar")], out=out)


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    with locked(folder), pytest.raises(FileExistsError, match="no other process writes to"):
        make(folder / "odd-0.tar")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = one_line("data", "index", folder / "odd-0.tar", "--workers", "1")
    assert "expected a folder that can be written to" in line
    assert "--out" in line


def test_a_kept_index_that_is_damaged_meanwhile_is_named_and_was_not_written(folder, monkeypatch):
    pattern = str(folder / "*.tar")
    make(pattern)
    monkeypatch.setattr(build_index, "_fits", lambda file, path, decoded: path.write_bytes(b"damage") > 0)
    found = make(pattern)
    assert (found["written"], len(found["unreadable"])) == (0, 2)


def test_unreadable_shards_are_named(folder):
    (folder / "no-0.tar").write_bytes(b"no tar" * 999)
    found = make(str(folder / "*.tar"))
    assert (found["shards"], found["written"]) == (3, 2)
    assert "no-0.tar' cannot be opened" in found["unreadable"][str(folder / "no-0.tar")]
    result = call("data", "index", str(folder / "*.tar"), "--workers", "1")
    assert result.exit_code == 0
    assert "18 samples in 3 shards; wrote 0 indices, kept 2" in result.output
    assert "not read: shard" in result.output
    assert "1 not an image (first: odd-0.tar/page" in result.output


def indexed_in(folder, out, ready):
    ready.set()
    build_index.run(str(folder / "*.tar"), out=out, decoded=True, workers=2, progress=False)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(6):
        write(source / f"{shard}.tar", [sample(i) for i in range(100)])

    def check_whole(out):
        for path in out.glob("*.npz") if out.exists() else ():
            assert index.opened(str(source / path.name.removesuffix(index.SUFFIX)), path).samples == 100

    target = functools.partial(indexed_in, source)
    kills.check(["simplclip.data.build_index"], target, tmp_path, check_whole)


@pytest.mark.slow
def test_skipping_is_fast(tmp_path, monkeypatch):
    """The bound is 20,000 samples a second in one process, low enough for a busy machine."""
    _, files = sample(0)
    path = write(tmp_path / "a.tar", [(f"k{i:06d}", files) for i in range(6_000)])
    make(path)
    without(monkeypatch)
    whole = loader(path, batch_size=100, transform=lambda image: torch.zeros(3, SIZE, SIZE))
    about = {"epoch": 0, "batches": 55, "batch_size": 100, "skipped": {"counts": {}, "examples": {}}}
    worker = {"items": 55, "lost": torch.tensor([], dtype=torch.int64)}
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        next(whole.epoch(0, 55, about | {"workers": [worker]}))
        rates.append(5_500 / (time.perf_counter() - began))
    assert max(rates) > 20_000 / 4
