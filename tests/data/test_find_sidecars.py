"""Sidecars are joined by key during reading, in order; one that does not fit is noticed."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from simplclip import data
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.read_tars import read_tar
from simplclip.data.samples import digest_of, parse
from support.data.pairs import keys, loader, npy, one_pass, png, resize, sample, write

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def taught(number, captions=3):
    """Returns the files of a teacher, whose row r of sample n is n + r / 8 everywhere."""
    rows = number + np.arange(1 + captions)[:, None] / 8 + np.zeros(6)
    digest = digest_of([f"{number} {letter}" for letter in "abc"[:captions]])
    return {
        "teacher.npy": npy(rows.astype(np.float16)),
        "teacher.json": json.dumps({"captions": digest}).encode(),
    }


def recaptioned(number):
    return {"json": json.dumps({"captions": [f"new {number}"]}).encode()}


def make(folder, out, files=taught, leave=()):
    """Writes sidecars of the shards in a folder, whose keys are numbers, without the samples to
    leave out.
    """
    out.mkdir(exist_ok=True)
    shards = {}
    for path in sorted(folder.glob("*.tar")):
        numbers = [
            int(sample["__key__"][1:]) for sample in read_tar(data.sources_of(path)[0], Skipped())
        ]
        write(out / path.name, [(f"k{n:03d}", files(n)) for n in numbers if n not in leave])
        shards[path.name] = {"samples": len(numbers), "source": {"bytes": path.stat().st_size}}
    about = (
        {"teacher": {"name": "t", "width": 6, "logit_scale": 10.0}}
        if files is taught
        else {"caption": {}}
    )
    (out / "meta.json").write_text(json.dumps(about | {"splits": {"train": {"shards": shards}}}))
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
    samples = read_tar(source, Skipped(), sidecars=folders)
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
    a, b = (
        make(folder, tmp_path / name, lambda n, name=name: {"json": name.encode()}) for name in "ab"
    )
    assert {files["json"] for files in read(folder / "train-0.tar", a, b).values()} == {b"b"}
    assert {files["json"] for files in read(folder / "train-0.tar", b, a).values()} == {b"a"}
    # A later teacher's features replace what belonged to an earlier teacher's, too.
    old = make(folder, tmp_path / "old", taught)
    new = make(folder, tmp_path / "new", lambda n: {"teacher.npy": taught(n)["teacher.npy"]})
    assert "teacher.json" in read(folder / "train-0.tar", new, old)["k000"]
    assert "teacher.json" not in read(folder / "train-0.tar", old, new)["k000"]


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_with_sidecars(folder, out, workers):
    options = {
        "teacher": True,
        "workers": workers,
        "sidecars": [out],
        "batch_size": 3,
        "shuffle_buffer": 4,
    }
    reader = loader(str(folder / "*.tar"), **options)
    batches = list(itertools.islice(reader, 5))
    for batch in batches:
        assert [int(key[1:]) for key in batch["key"]] == batch["teacher_image"][:, 0].tolist()


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
        with pytest.raises(
            data.ShardError,
            match=r"sidecar of shard '.*out/train-1.tar' is damaged: .*; remove it",
        ):
            read(folder / "train-1.tar", out)


def test_a_sidecar_of_other_samples_is_noticed(folder, out):
    (out / "train-1.tar").write_bytes((out / "train-0.tar").read_bytes())
    with pytest.raises(
        data.ShardError,
        match="sidecar '.*out/train-1.tar' has the sample 'k000', which its shard does not have",
    ):
        read(folder / "train-1.tar", out)


@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_damaged_shard_with_a_sidecar_is_counted(folder, out, form):
    """The sidecar has samples that the shard has lost, which is no fault of the sidecar."""
    path = folder / "train-1.tar"
    os.truncate(path, path.stat().st_size // 2)
    shard = str(path) if form == "file" else f"pipe:cat {path}"
    skipped = Skipped()
    source = data.sources_of(shard)[0]
    samples = list(read_tar(source, skipped, sidecars=[out]))
    assert 0 < len(samples) < 5
    assert all("teacher.npy" in files for files in samples)
    assert skipped.counts == {"damaged tar": 1}
    with pytest.raises(data.ShardError, match=r"shard '.*in/train-1\.tar' is damaged"):
        list(read_tar(source, Skipped(), sidecars=[out], on_error="stop"))


def test_a_sidecar_may_lack_samples(folder, tmp_path):
    out = make(folder, tmp_path / "out", leave=(0, 3, 6))
    assert ["teacher.npy" in files for files in read(folder / "train-0.tar", out).values()] == [
        False,
        True,
        True,
    ] * 2 + [False]
    with pytest.raises(
        data.ShardError, match=r"sample 'k000' of shard '.*train-0.tar' has no teacher features"
    ):
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
    with pytest.raises(
        data.ShardError,
        match=r"'.*train-1.tar' has changed since its sidecar '.*out/train-1.tar' was made",
    ):
        loader(str(folder / "*.tar"), sidecars=[out])


def test_a_key_that_comes_again_is_counted_not_mistaken(tmp_path):
    (tmp_path / "in").mkdir()
    path = write(
        tmp_path / "in" / "a.tar", [sample(0), sample(2), (sample(0)[0], sample(1)[1]), sample(3)]
    )
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "a.tar", [(f"k{n:03d}", taught(n)) for n in (0, 2, 3)])
    found, skipped = one_pass(path, sidecars=[tmp_path / "out"], teacher=True)
    assert (found, skipped.counts) == (["k000", "k002", "k003"], {"duplicate key in tar": 1})
    assert (
        sum(
            isinstance(files.get("__double__"), BrokenSample)
            for files in read(path, tmp_path / "out").values()
        )
        == 1
    )


def test_sidecars_belong_to_tars_of_different_names(folder, out, tmp_path):
    write(((other := tmp_path / "other").mkdir() or other) / "train-0.tar", [sample(30)])
    with pytest.raises(
        ValueError,
        match="expected files of different names, since sidecars go by them, got .*train-0.tar. "
        "and .*other",
    ):
        loader([str(folder / "*.tar"), str(other / "*.tar")], sidecars=[out])
    twice = [{"shards": str(folder / "train-0.tar"), "weight": 2}, str(folder / "train-1.tar")]
    found, _ = one_pass(twice, sidecars=[out], teacher=True)
    assert Counter(found) == Counter({f"k{i:03d}": 1 + (i < 7) for i in range(12)})


def test_streams_have_sidecars_by_their_file_names(folder, out):
    reader = loader(
        f"pipe:cat {folder / 'train-1.tar'}",
        sidecars=[out],
        teacher=True,
        batch_size=1,
        transform=resize,
    )
    batches = list(itertools.islice(reader, 5))
    assert len(set(keys(batches))) == 5
    for batch in batches:
        assert batch["teacher_image"].eq(int(batch["key"][0][1:])).all()


def test_meta_json_of_anything(folder, out):
    for text in (
        "[",
        '{"splits": 5}',
        '{"splits": {"a": {"shards": {"train-0.tar": 3, "train-1.tar": {"source": 5}}}}}',
    ):
        Path(out, "meta.json").write_text(text)
        loader(str(folder / "*.tar"), sidecars=[out])
        Path(folder, "meta.json").write_text(text)
        assert data.dataset_size(str(folder / "*.tar")) is None
