"""Rewriting shards: nothing of a sample is lost, work resumes after a crash at any moment, wrong folders are refused."""

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
from pairs import digests, killed_at_any_point, members, meta, png, sample, write

from simplclip.data import expand, shards
from simplclip.data.rewrite import rewrite

STAMP = {"mark": {"name": "test", "width": 2}}


def mark(samples):
    return [{"mark.npy": f"{len(s.captions)} {s.image.size} {s.files['__key__']}".encode()} for s in samples]


def run(shards, out, process=mark, *, stamp=STAMP, batch_size=4, **options):
    return rewrite(str(shards), out, process, stamp=stamp, batch_size=batch_size, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """Writes two train shards and a held-out shard, with their meta.json and licences."""
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


def test_every_file_of_a_sample_is_kept(tmp_path, out):
    long = "folder/" + "x" * 150
    files = {"cls": b"7", "seg.png": png(5), "JSON": json.dumps({"captions": ["ä", "b"]}).encode(), "png": png(1), "npy": b""}
    other = {"jpg": png(2, form="JPEG"), "txt": b"one"}
    write(tmp_path / "a.tar", [(long, files), ("dänisch", other)])
    summary = run(tmp_path / "a.tar", out)
    assert (summary["shards"], summary["written"], summary["samples"], summary["notes"]) == (1, 1, 2, [])
    want = {f"{long}.{suffix.lower()}": data for suffix, data in files.items()}
    want |= {f"{long}.mark.npy": f"2 (12, 12) {long}".encode()}
    want |= {f"dänisch.{suffix}": data for suffix, data in (*other.items(), ("mark.npy", "1 (12, 12) dänisch".encode()))}
    assert list(members(out / "a.tar").items()) == list(want.items())


def test_the_folder_says_what_is_in_it(folder, out):
    sizes = []
    assert run(folder / "*.tar", out, lambda batch: sizes.append(len(batch)) or mark(batch))["samples"] == 15
    assert sizes == [3, 4, 3, 4, 1]  # batches do not cross shards
    found = meta(out)
    assert (found["mark"], found["seed"]) == (STAMP["mark"], 3)
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


def test_broken_samples_and_a_tear_are_counted_and_copied(tmp_path):
    good, other = sample(0), sample(1)
    broken = ("broken", {"png": b"no image", "txt": b"one", "npy": b"kept"})
    path = Path(write(tmp_path / "a-0.tar", [good, broken, ("only", {"cls": b"1"}), other]))
    whole = run(path, tmp_path / "whole")
    assert dict(whole["skipped"].counts) == {"not an image": 1, "missing caption": 1}
    assert "a-0.tar/broken" in whole["notes"][0]
    found = members(tmp_path / "whole" / "a-0.tar")
    assert {name for name in found if "mark" in name} == {"k000.mark.npy", "k001.mark.npy"}
    assert {found["broken.npy"], found["only.cls"]} == {b"kept", b"1"}
    assert whole["samples"] == 3  # the loader cannot use a sample with only a class

    path.write_bytes(path.read_bytes()[: -tarfile.RECORDSIZE + 512])
    os.truncate(path, path.stat().st_size // 512 * 512 - 1024)
    torn = run(path, tmp_path / "torn")
    assert torn["skipped"].counts["torn tar"] == 1
    assert "torn" in torn["notes"][0]
    with tarfile.open(tmp_path / "torn" / "a-0.tar") as tar:
        assert "k000.mark.npy" in tar.getnames()
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
        ({"shards": "{held-0,copy/train-0}.tar", "out": "new"}, ValueError, "got different 'seed' in"),
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
@pytest.mark.parametrize("sidecar", [pytest.param(False, marks=pytest.mark.prove), True])
def test_killed_at_any_point(folder, tmp_path, sidecar):
    """kill -9 at each batch and each line that writes a file, then the same command: no shard is torn, and the command's
    result is that of an undisturbed one."""

    def work(out, step):
        made = lambda batch: step() or [{"mark.npy": s.place.encode() * 2000} for s in batch]  # noqa: E731
        run(folder / "train-*.tar", out, made, sidecar=sidecar)

    def check(out):
        assert not (out / "meta.json").exists() or meta(out)["mark"] == STAMP["mark"]

    killed_at_any_point(tmp_path, work, 40 if sidecar else 50, check)
