"""Sidecars are joined by key during reading, in order; one that does not fit is noticed."""

import json
import os
from collections import Counter

import pytest

from simplclip import data
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.samples import digest_of, parse
from simplclip.data.sidecars import read_joined
from support.data.pairs import features_of, keys, loader, npy, one_pass, png, sample, take, write


def taught(number):
    about = {"captions": digest_of([f"{number} {letter}" for letter in "abc"])}
    return {"teacher.npy": npy(features_of(number)), "teacher.json": json.dumps(about).encode()}


def recaptioned(number):
    return {"json": json.dumps({"captions": [f"new {number}"]}).encode()}


def make(folder, out, files=taught, leave=()):
    """Writes sidecars of the shards in a folder, without the numbers of samples to leave out."""
    out.mkdir(exist_ok=True)
    shards = {}
    for path in sorted(folder.glob("*.tar")):
        numbers = [int(key[1:]) for key in read(path)]
        write(out / path.name, [(f"k{n:03d}", files(n)) for n in numbers if n not in leave])
        shards[path.name] = {
            "samples": len(numbers),
            "bytes": 0,
            "source": {"bytes": path.stat().st_size},
        }
    (out / "meta.json").write_text(json.dumps({"splits": {"train": {"shards": shards}}}))
    return out


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, start, stop in (("train-0", 0, 7), ("train-1", 7, 12)):
        write(source / f"{name}.tar", [sample(i) for i in range(start, stop)])
    return source


@pytest.fixture
def out(folder, tmp_path):
    return make(folder, tmp_path / "out")


def read(shard, *folders):
    source = data.sources_of(shard)[0]
    samples = read_joined(source, Skipped(), folders)
    return {sample["__key__"]: sample for sample in samples}


def test_files_are_joined_by_key(folder, out, tmp_path):
    captions = make(folder, tmp_path / "captions", recaptioned)
    joined, plain = read(folder / "train-1.tar", out, captions), read(folder / "train-1.tar")
    assert list(joined) == list(plain)
    for key, files in joined.items():
        number = int(key[1:])
        assert files == plain[key] | taught(number) | recaptioned(number)
        assert parse(files).captions == [f"new {number}"]


def test_of_one_suffix_the_last_folder_counts(folder, tmp_path):
    a = make(folder, tmp_path / "a", lambda number: {"json": b"a"})
    b = make(folder, tmp_path / "b", lambda number: {"json": b"b"})
    assert {files["json"] for files in read(folder / "train-0.tar", a, b).values()} == {b"b"}
    assert {files["json"] for files in read(folder / "train-0.tar", b, a).values()} == {b"a"}
    # A later teacher's features replace what belonged to an earlier teacher's, too.
    old = make(folder, tmp_path / "old", taught)
    new = make(folder, tmp_path / "new", lambda n: {"teacher.npy": taught(n)["teacher.npy"]})
    assert "teacher.json" in read(folder / "train-0.tar", new, old)["k000"]
    assert "teacher.json" not in read(folder / "train-0.tar", old, new)["k000"]


def test_what_is_missing_is_named(folder, out, monkeypatch):
    path = out / "train-1.tar"
    whole = path.read_bytes()
    path.unlink()
    message = r"shard '.*in/train-1.tar' has no sidecar '.*out/train-1.tar'; run the command"
    with pytest.raises(data.ShardError, match=message):
        read(folder / "train-1.tar", out)
    with pytest.raises(data.ShardError, match=message):
        loader(str(folder / "*.tar"), sidecars=[out])
    with pytest.raises(ValueError, match="sidecars: expected folders, got '.*none', which is none"):
        loader(str(folder / "*.tar"), sidecars=[out.parent / "none"])
    with pytest.raises(ValueError, match="sidecars: expected a list of folders, got"):
        loader(str(folder / "*.tar"), sidecars=str(out))
    for damaged in (whole[:3000], b"", b"<html>" * 99):
        path.write_bytes(damaged)
        message = r"sidecar of shard '.*out/train-1.tar' is damaged: .*; remove it"
        with pytest.raises(data.ShardError, match=message):
            read(folder / "train-1.tar", out)


def test_a_sidecar_of_other_samples_is_noticed(folder, out):
    (out / "train-1.tar").write_bytes((out / "train-0.tar").read_bytes())
    message = "sidecar '.*out/train-1.tar' has the sample 'k000', which its shard does not have"
    with pytest.raises(data.ShardError, match=message):
        read(folder / "train-1.tar", out)


@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_damaged_shard_with_a_sidecar_is_counted(folder, out, form):
    """The sidecar has samples that the shard has lost, which is no fault of the sidecar."""
    path = folder / "train-1.tar"
    os.truncate(path, path.stat().st_size // 2)
    shard = str(path) if form == "file" else f"pipe:cat {path}"
    skipped = Skipped()
    source = data.sources_of(shard)[0]
    samples = list(read_joined(source, skipped, [out]))
    assert 0 < len(samples) < 5
    assert all("teacher.npy" in files for files in samples)
    assert skipped.counts == {"damaged tar": 1}
    with pytest.raises(data.ShardError, match=r"shard '.*in/train-1\.tar' is damaged"):
        list(read_joined(source, Skipped(), [out], on_error="stop"))


def test_a_sidecar_may_lack_samples(folder, tmp_path):
    out = make(folder, tmp_path / "out", leave=(0, 3, 6))
    samples = read(folder / "train-0.tar", out)
    assert [key for key in samples if "teacher.npy" not in samples[key]] == ["k000", "k003", "k006"]
    message = r"sample 'k000' of shard '.*train-0.tar' has no teacher features"
    with pytest.raises(data.ShardError, match=message):
        one_pass(str(folder / "*.tar"), sidecars=[out], teacher=True)


def test_broken_samples_have_no_files_and_are_skipped(tmp_path):
    samples = [
        sample(0),
        ("k001", {"png": png(1)[:200], "txt": b"one"}),
        ("k002", {"png": b"no image", "txt": b"one"}),
    ]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.tar", [*samples, ("k003", {"txt": b"one"}), sample(4)])
    out = make(tmp_path / "in", tmp_path / "out", leave=(1, 2, 3))
    found, skipped = one_pass(path, sidecars=[out], teacher=True)
    assert found == ["k000", "k004"]
    assert skipped.counts == {"truncated image": 1, "not an image": 1, "missing image": 1}


def test_shards_that_have_changed_since_are_noticed(folder, out):
    write(folder / "train-1.tar", [sample(i) for i in range(30, 60)])
    message = r"'.*train-1.tar' has changed since its sidecar '.*out/train-1.tar' was made"
    with pytest.raises(data.ShardError, match=message):
        loader(str(folder / "*.tar"), sidecars=[out])


def test_a_key_that_comes_again_is_counted_not_mistaken(tmp_path):
    (tmp_path / "in").mkdir()
    samples = [sample(0), sample(2), (sample(0)[0], sample(1)[1]), sample(3)]
    path = write(tmp_path / "in" / "a.tar", samples)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "a.tar", [(f"k{n:03d}", taught(n)) for n in (0, 2, 3)])
    found, skipped = one_pass(path, sidecars=[tmp_path / "out"], teacher=True)
    assert (found, skipped.counts) == (["k000", "k002", "k003"], {"duplicate key in tar": 1})
    doubles = [files.get("__double__") for files in read(path, tmp_path / "out").values()]
    assert sum(isinstance(double, BrokenSample) for double in doubles) == 1


def test_sidecars_belong_to_tars_of_different_names(folder, out, tmp_path):
    write(((other := tmp_path / "other").mkdir() or other) / "train-0.tar", [sample(30)])
    message = "files of different names, since sidecars go by them, got .*train-0.tar. and .*other"
    with pytest.raises(ValueError, match=message):
        loader([str(folder / "*.tar"), str(other / "*.tar")], sidecars=[out])
    twice = [{"shards": str(folder / "train-0.tar"), "weight": 2}, str(folder / "train-1.tar")]
    found, _ = one_pass(twice, sidecars=[out], teacher=True)
    assert Counter(found) == Counter({f"k{i:03d}": 1 + (i < 7) for i in range(12)})


def test_streams_have_sidecars_by_their_file_names(folder, out):
    stream = f"pipe:cat {folder / 'train-1.tar'}"
    batches = take(loader(stream, sidecars=[out], teacher=True, batch_size=1), 5)
    assert len(set(keys(batches))) == 5
    for batch in batches:
        assert batch["teacher_image"].eq(int(batch["key"][0][1:])).all()
