"""Sidecars are written shard by shard: nothing is lost by a stop, wrong folders are refused."""

import errno
import json
import os
import signal

import pytest

from simplclip import data
from simplclip.data.samples import Pair
from simplclip.data.sidecars import write_sidecars
from support.data.pairs import digests, members, meta, sample, write

STAMP = {"mark": {"name": "test", "width": 2}}


def prepare(pair: Pair):
    return pair.name, pair.captions, pair.image.size  # decodes the image


def mark(batch):
    return [
        {"json": json.dumps({"captions": captions, "seen": [place, size]}).encode()}
        for place, captions, size in batch
    ]


def run(shards, out, process=mark, *, stamp=STAMP, batch_size=4, **options):
    options = {"prepare": prepare, "progress": False} | options
    return write_sidecars(
        str(shards), out, process=process, stamp=stamp, batch_size=batch_size, **options
    )


@pytest.fixture
def folder(tmp_path):
    """Writes two train shards and a held-out shard."""
    source = tmp_path / "in"
    source.mkdir()
    for name, start, stop in (("train-0", 0, 7), ("train-1", 7, 12), ("held-0", 12, 15)):
        write(source / f"{name}.tar", [sample(i) for i in range(start, stop)])
    return source


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_sidecar_has_what_is_new_in_the_order_of_its_shard(folder, out, tmp_path):
    sizes = []
    summary = run(folder / "*.tar", out, lambda batch: sizes.append(len(batch)) or mark(batch))
    assert (summary["shards"], summary["written"], summary["samples"]) == (3, 3, 15)
    assert sizes == [3, 4, 3, 4, 1]  # batches do not cross shards
    assert list(members(out / "train-0.tar")) == [f"k{i:03d}.json" for i in range(7)]
    record = json.loads(members(out / "train-1.tar")["k008.json"])
    assert record == {"captions": ["8 a", "8 b", "8 c"], "seen": ["train-1.tar/k008", [12, 12]]}
    about = meta(out)
    assert about["mark"] == STAMP["mark"]
    assert about["splits"]["data"]["samples"] == 15
    entry = about["splits"]["data"]["shards"]["train-1.tar"]
    assert (entry["samples"], entry["bytes"]) == (5, (out / "train-1.tar").stat().st_size)
    assert entry["source"]["bytes"] == (folder / "train-1.tar").stat().st_size
    run(folder / "*.tar", tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == digests(out)


def test_a_second_command_adds_shards_and_keeps_what_is_whole(folder, out, capsys):
    run(folder / "train-*.tar", out)
    first = digests(out)
    assert run(folder / "held-*.tar", out)["samples"] == 3
    assert first.items() - digests(out).items() == {("meta.json", first["meta.json"])}
    before = digests(out)
    (out / ".former.tar.0123456789abcdef.tmp").write_bytes(b"left by a run that was killed")
    summary = write_sidecars(folder / "*.tar", out, prepare, None, stamp=STAMP, batch_size=4)
    assert (summary["written"], summary["samples"]) == (0, 15)
    assert "3 of 3 sidecars in" in capsys.readouterr().out
    assert digests(out) == before


def test_what_is_stale_is_made_again(folder, out, tmp_path):
    """A sidecar has the size and time of its shard and of the sidecars that were joined."""
    captions = tmp_path / "captions"
    assert run(folder / "train-*.tar", captions)["written"] == 2
    run(folder / "train-*.tar", out, sidecars=[captions])
    size = (folder / "train-1.tar").stat().st_size
    write(folder / "train-1.tar", [sample(i) for i in range(8, 13)])
    assert (folder / "train-1.tar").stat().st_size == size
    assert run(folder / "train-*.tar", captions)["written"] == 1
    assert "k012.json" in members(captions / "train-1.tar")
    for written in (1, 0):
        assert run(folder / "train-*.tar", out, sidecars=[captions])["written"] == written
    assert run(folder / "train-*.tar", out)["written"] == 2  # made of other captions
    write(folder / "train-0.tar", [sample(i) for i in range(40)])
    message = r"'.*train-0.tar' has changed since its sidecar '.*captions/train-0.tar'"
    with pytest.raises(data.ShardError, match=message):
        run(folder / "train-*.tar", out, sidecars=[captions])


def test_a_shard_that_is_replaced_while_it_is_read_is_read_again(folder, out, tmp_path):
    new = write(tmp_path / "new.tar", [sample(i) for i in range(20, 24)])

    def replace_and_mark(batch):
        if os.path.exists(new):  # the samples of the first batch are read already
            os.replace(new, folder / "train-1.tar")
        return mark(batch)

    assert run(folder / "train-1.tar", out, replace_and_mark)["samples"] == 5
    assert run(folder / "train-1.tar", out)["written"] == 1
    assert list(members(out / "train-1.tar")) == [f"k{i:03d}.json" for i in range(20, 24)]
    assert run(folder / "train-1.tar", out)["written"] == 0


def test_what_is_joined_is_seen(folder, out, tmp_path):
    def recaption(batch):
        return [{"json": b'{"captions": ["new"]}'} for _ in batch]

    run(folder / "train-0.tar", tmp_path / "captions", recaption)
    run(folder / "train-0.tar", out, sidecars=[tmp_path / "captions"])
    assert json.loads(members(out / "train-0.tar")["k003.json"])["captions"] == ["new"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stamp": {"mark": {"name": "test", "width": 3}}}, "'width': 2.* now .*'width': 3"),
        ({"shards": "{train-0,copy/train-0}.tar"}, "different names"),
        ({"out": "in"}, "another folder than that of the shard"),
        ({"out": "full"}, "holds other files \\(notes.txt"),
        ({"out": "in-too"}, "holds other files \\(meta.json"),
        ({"out": "file"}, "expected a folder, got the file"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"sidecars": ["none"]}, "sidecars: expected folders, got 'none', which is none"),
        ({"process": lambda batch: [], "out": "new"}, "shorter than"),
    ],
)
def test_wrong_arguments(folder, tmp_path, change, message):
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
    with pytest.raises(ValueError, match=message):
        run(files, out, **change)
    assert before == {name: digests(tmp_path / name) for name in before}


class Dies:
    """Prepares samples in workers until `place`, where the process is killed."""

    def __call__(self, pair):
        if pair.key == "k010":
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(pair)


@pytest.mark.parametrize("fault", ["error", "disk", "worker"])
def test_a_fault_leaves_whole_sidecars_and_the_command_goes_on(folder, tmp_path, out, fault):
    def process(batch):
        if batch[0][0] == "train-1.tar/k011" and fault in raised:
            raise raised[fault]
        return mark(batch)

    raised = {"error": RuntimeError("stop"), "disk": OSError(errno.ENOSPC, "No space")}
    error, message = {
        "error": (RuntimeError, "stop"),
        "disk": (ValueError, "train-1.tar could not be written: No space; the same command goes"),
        "worker": (RuntimeError, "DataLoader worker"),
    }[fault]
    options = {"prepare": Dies(), "workers": 1} if fault == "worker" else {}
    with pytest.raises(error, match=message):
        run(folder / "train-*.tar", out, process, **options)
    # a dead worker may lose batches that it had made before
    assert set(digests(out)) - {"train-0.tar"} == {"meta.json"}
    run(folder / "train-*.tar", out)
    run(folder / "train-*.tar", tmp_path / "undisturbed")
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_streams_have_sidecars_by_their_file_names(folder, out):
    assert run(f"pipe:cat {folder / 'train-1.tar'}", out, workers=2)["samples"] == 5
    assert run(f"pipe:cat {folder / 'train-1.tar'}", out)["written"] == 0
    assert list(members(out / "train-1.tar")) == [f"k{i:03d}.json" for i in range(7, 12)]
