"""Making sidecars: a crash at any moment is made good, and wrong folders are refused. What is in them: test_sidecars.py."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from pairs import digests, killed_at_any_point, members, meta, sample, write

from simplclip.data import expand, shards
from simplclip.data.build_sidecars import build

STAMP = {"mark": {"name": "test", "width": 2}}


def mark(samples):
    return [{"mark.npy": f"{len(s.captions)} {s.image.size} {s.files['__key__']}".encode()} for s in samples]


def run(shards, out, process=mark, *, stamp=STAMP, batch_size=4, **options):
    return build(str(shards), out, process, stamp=stamp, batch_size=batch_size, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """Two train shards and a held-out one, with their meta.json and licences."""
    source = tmp_path / "in"
    source.mkdir()
    for name, start, stop in (("train-0", 0, 7), ("train-1", 7, 12), ("held-0", 12, 15)):
        write(source / f"{name}.tar", [sample(i) for i in range(start, stop)])
    (source / "meta.json").write_text(json.dumps({"format": "other", "seed": 3, "splits": {}}))
    (source / "LICENSES.md").write_text("as you like")
    return source


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_the_folder_says_what_is_in_it(folder, out):
    sizes = []
    assert run(folder / "*.tar", out, lambda batch: sizes.append(len(batch)) or mark(batch))["samples"] == 15
    assert sizes == [3, 4, 3, 4, 1]  # within a shard
    found = meta(out)
    assert found["mark"] == STAMP["mark"]
    assert {name: split["samples"] for name, split in found["splits"].items()} == {"held": 3, "train": 12}
    for name, entry in found["splits"]["train"]["shards"].items():
        data = (out / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert shards._listed_counts(str(out))
    assert shards.count_samples(expand(str(out / "*.tar"))) == [3, 7, 5]
    assert (out / "LICENSES.md").read_text() == "as you like"
    assert set(digests(out)) == {"LICENSES.md", "held-0.tar", "meta.json", "train-0.tar", "train-1.tar"}


def test_a_second_command_adds_shards(folder, out):
    run(folder / "train-*.tar", out)
    first = digests(out)
    assert run(folder / "held-*.tar", out)["samples"] == 3
    assert first.items() - digests(out).items() == {("meta.json", first["meta.json"])}
    assert {name: split["samples"] for name, split in meta(out)["splits"].items()} == {"train": 12, "held": 3}


def test_whole_shards_are_not_made_again_unless_their_input_changed(folder, out):
    run(folder / "train-*.tar", out)
    before = digests(out)
    (out / ".former.tar.tmp").write_bytes(b"left by a run that was killed")
    summary = run(folder / "train-*.tar", out, None)
    assert (summary["written"], summary["samples"]) == (0, 12)
    assert "2 of 2 shards" in summary["notes"][0]
    assert digests(out) == before
    size = (folder / "train-1.tar").stat().st_size
    write(folder / "train-1.tar", [sample(i) for i in range(8, 13)])
    assert (folder / "train-1.tar").stat().st_size == size
    assert run(folder / "train-*.tar", out)["written"] == 1
    assert "k012.mark.npy" in members(out / "train-1.tar")


def test_a_tear_is_counted(tmp_path):
    path = Path(write(tmp_path / "a-0.tar", [sample(i) for i in range(20)]))
    os.truncate(path, path.stat().st_size // 2)
    torn = run(path, tmp_path / "torn")
    assert torn["skipped"].counts["torn tar"] == 1
    assert "torn" in torn["notes"][0]
    assert "k000.mark.npy" in members(tmp_path / "torn" / "a-0.tar")
    again = run(path, tmp_path / "torn")
    assert again["written"] == 0
    assert again["skipped"] == torn["skipped"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stamp": {"mark": {"name": "test", "width": 3}}}, ValueError, "mark.width was 2, now 3"),
        ({"shards": "{train-0,copy/train-0}.tar"}, ValueError, "different names"),
        ({"out": "in"}, ValueError, "another folder than that of the input"),
        ({"out": "full"}, FileExistsError, "holds other files \\(notes.txt"),
        ({"out": "in-too"}, FileExistsError, "with another meta.json"),
        ({"out": "file"}, FileExistsError, "expected a folder, got the file"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1, got 0"),
        ({"process": lambda batch: [], "out": "new"}, ValueError, "expected the files of 4 samples, got 0"),
    ],
)
def test_wrong_arguments(folder, tmp_path, change, error, message):
    run(folder / "train-0.tar", tmp_path / "out")
    for path in (folder / "copy", tmp_path / "full", tmp_path / "in-too"):
        path.mkdir()
    write(folder / "copy" / "train-0.tar", [sample(0)])
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "in-too" / "meta.json").write_text(json.dumps({"format": "other"}))
    (tmp_path / "file").write_text("mine")
    before = {name: digests(tmp_path / name) for name in ("out", "full", "in-too")}
    files = folder / change.pop("shards", "train-0.tar")
    out = tmp_path / change.pop("out", "out")
    with pytest.raises(error, match=message):
        run(files, out, **change)
    assert before == {name: digests(tmp_path / name) for name in before}


def test_one_process_writes_at_a_time(folder, out):
    def process(batch):
        with pytest.raises(FileExistsError, match="no other process writes to, got"):
            run(folder / "train-0.tar", out)
        return mark(batch)

    run(folder / "train-0.tar", out, process)


def test_an_error_leaves_whole_shards_only(folder, tmp_path, out):
    def process(batch):
        if batch[0].files["__key__"] == "k011":
            raise RuntimeError("stop")
        return mark(batch)

    with pytest.raises(RuntimeError, match="stop"):
        run(folder / "train-*.tar", out, process)
    assert set(digests(out)) == {"LICENSES.md", "meta.json", "train-0.tar"}
    assert run(folder / "train-*.tar", out)["written"] == 1
    run(folder / "train-*.tar", tmp_path / "undisturbed")
    assert digests(out) == digests(tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_at_any_point(folder, tmp_path):
    """kill -9 at each batch and each line that writes a file, then the same command: no torn sidecar is seen, and it ends
    as undisturbed."""

    def work(out, step):
        made = lambda batch: step() or [{"mark.npy": s.place.encode() * 2000} for s in batch]  # noqa: E731
        run(folder / "train-*.tar", out, made)

    def check(out):
        assert not (out / "meta.json").exists() or meta(out)["mark"] == STAMP["mark"]

    killed_at_any_point(tmp_path, work, 40, check)
