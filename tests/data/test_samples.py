"""Valid samples, and every kind of damage to a sample or its tar."""

import json
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from simplclip import data
from simplclip.data import samples
from simplclip.data.errors import Skipped
from simplclip.data.shards import read_tar
from support.data.pairs import loader, one_pass, png, sample, text_of, write
from support.data.photos import png_that_claims
from support.evaluation import batches_of


def one(tmp_path, files, **options):
    """Returns the first batch of a shard with one sample."""
    return next(iter(loader(write(tmp_path / "a.tar", [("a", files)]), batch_size=1, **options)))


@pytest.mark.parametrize(("suffix", "form"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("JPG", "JPEG")])
def test_image_kinds(tmp_path, suffix, form):
    batch = one(tmp_path, {suffix: png(form=form), "txt": b"one"})
    assert text_of(batch["text"][0]) == "one"
    assert batch["meta"] == [{}]


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b" one \n"}, "one"),
        ({"txt": b"one\ntwo \t three\n"}, "one two three"),  # a txt is one caption
        ({"json": b'{"caption": "two"}', "txt": b"one"}, "two"),
        ({"json": b'{"captions": ["three", "", 3]}', "txt": b"one"}, "three"),
        ({"json": b'{"captions": [], "caption": ""}', "txt": b"one"}, "one"),
        ({"json": '{"caption": "zwölf"}'.encode()}, "zwölf"),
    ],
)
def test_where_captions_come_from(tmp_path, files, caption):
    batch = one(tmp_path, {"png": png()} | files)
    assert text_of(batch["text"][0]) == caption.encode()[:12].decode().strip()


def test_groups(tmp_path):
    plain = {"png": png(), "txt": b"x"}
    same = plain | {"json": b'{"group": "cat"}'}
    write(tmp_path / "a.tar", [("a", same), ("b", plain)])
    write(tmp_path / "b.tar", [("c", same), ("b", plain), ("cat", plain)])
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "b.tar", [("b", plain)])
    shards = [str(tmp_path / "*.tar"), str(tmp_path / "other" / "*.tar")]
    groups = next(iter(loader(shards, batch_size=6, shuffle=False)))["group"].tolist()
    assert groups[0] == groups[2]  # both name the group "cat"
    # equal keys in two shards are two samples, and a key is not a group's name
    assert len(set(groups)) == 5
    assert all(0 <= group < 2**63 for group in groups)
    # The hash is pinned, since it must be the same in every process and version.
    assert groups[0] == samples.stable_hash("group/cat") >> 1 == 5663915147306578298


DAMAGE = {
    "truncated image": {"png": png(size=(64, 64))[:2000], "txt": b"x"},
    "truncated image (jpg)": {"jpg": png(size=(64, 64), form="JPEG")[:900], "txt": b"x"},
    "not an image": {"png": b"hello", "txt": b"x"},
    "not an image (empty)": {"png": b"", "txt": b"x"},
    "image too large": {"png": png_that_claims(60000), "txt": b"x"},
    "missing image": {"txt": b"x"},
    "missing caption": {"png": png()},
    "missing caption (json)": {"png": png(), "json": b'{"group": 1}'},
    "empty caption": {"png": png(), "txt": b" \n"},
    "empty caption (json)": {"png": png(), "json": b'{"captions": ["", " "]}'},
    "empty caption (zeros)": {"png": png(), "txt": bytes(512)},
    "caption not UTF-8": {"png": png(), "txt": b"\xff\xfe\xff"},
    "bad json": {"png": png(), "json": b'{"caption": ', "txt": b"x"},
    "bad json (list)": {"png": png(), "json": b"[1]", "txt": b"x"},
    "file too large": {"png": png() + bytes(5000), "txt": b"x"},
}


@pytest.mark.parametrize("missing", ["null", "NaN", '""'])
def test_a_missing_group_or_label_is_none(tmp_path, missing):
    """Such samples are not one group, nor images of one class."""
    content = f'{{"caption": "x", "group": {missing}, "label": {missing}}}'.encode()
    files = {"png": png(), "json": content}
    shard = write(tmp_path / "a.tar", [(str(number), files) for number in range(4)])
    batch = next(iter(loader(shard, batch_size=4)))
    assert len({*batch["group"].tolist()}) == 4
    held, _ = batches_of(data.held_out({"shards": shard, "hold_out": 0.5}))
    assert 0 < sum(len(batch.rows) for batch in held) < 4
    (batch,), _ = batches_of(data.held_out(shard))
    assert [(row.group, row.label) for row in batch.rows] == [(None, None)] * 4


def test_broken_samples_are_skipped_and_counted(tmp_path):
    broken = [(f"broken{i}", files) for i, files in enumerate(DAMAGE.values())]
    good = [sample(i) for i in range(len(broken))]
    path = write(tmp_path / "a.tar", [pair for pairs in zip(good, broken) for pair in pairs])
    found, skipped = one_pass(path, on_error="stop", max_bytes=5000)  # which is about tars
    assert found == [key for key, _ in good]
    expected = Counter(reason.split(" (")[0] for reason in DAMAGE)
    assert skipped.counts == expected
    assert str(skipped).startswith(f"{len(broken)} skipped: ")
    for reason, count in expected.items():
        assert f"{count} {reason} (first: a.tar/broken" in str(skipped)


def test_a_double_file_is_counted_and_the_first_one_used(tmp_path):
    twice = ("a", {"png": png(), "txt": b"first"}), ("a", {"txt": b"second"})
    path = write(tmp_path / "a.tar", [sample(0), *twice, sample(1)])
    found, skipped = one_pass(path)
    assert (found, skipped.counts) == (["k000", "a", "k001"], {"duplicate file in tar": 1})
    batch = next(iter(loader(path, batch_size=3, shuffle=False)))
    assert text_of(batch["text"][1]) == "first"


def member(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name)


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize(
    "where", ["inside a file", "inside a header", "between files", "garbage header"]
)
def test_samples_before_the_damage_are_used(tmp_path, where, form):
    path = write(tmp_path / "torn.tar", [sample(i) for i in range(6)])
    other = write(tmp_path / "whole.tar", [sample(i) for i in range(6, 9)])
    start = member(path, "k004.png").offset
    rest = {"inside a file": tarfile.BLOCKSIZE + 10, "inside a header": 100}.get(where, 0)
    os.truncate(path, start + rest)
    if where == "garbage header":
        with open(path, "ab") as file:
            file.write(b"\x17" * 4096)
    shard = path if form == "file" else f"pipe:cat {path}"
    found, skipped = one_pass([shard, other])
    assert found == [f"k{i:03d}" for i in (0, 1, 2, 3, 6, 7, 8)]
    assert skipped.counts == {"damaged tar": 1}
    assert "torn.tar" in skipped.examples["damaged tar"]
    with pytest.raises(data.ShardError, match=r"shard '.*torn\.tar' is damaged: .+") as caught:
        one_pass([shard, other], on_error="stop")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize(
    ("end", "damaged"),
    [("1 MiB records", False), ("zeros", True), ("another tar", True), ("one byte", True)],
)
def test_what_follows_the_end_of_a_tar_is_padding_or_damage(tmp_path, end, damaged, form):
    """Zeros also end a tar that was not written to its end."""
    path = Path(write(tmp_path / "a.tar", [sample(i) for i in range(3)]))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % tarfile.BLOCKSIZE)
    marker = 2 * tarfile.BLOCKSIZE
    record = 1 << 20
    ends = {
        # the longest padding: the end marker does not fit into the first record
        "1 MiB records": bytes(tarfile.BLOCKSIZE + record),
        "zeros": bytes(marker + record),
        "another tar": path.read_bytes()[len(content) :] + path.read_bytes(),
        "one byte": bytes(marker) + b"\1",
    }
    path.write_bytes(content + ends[end])
    shard = str(path) if form == "file" else f"pipe:cat {path}"
    found, skipped = one_pass(shard)
    assert found == ["k000", "k001", "k002"]
    assert skipped.counts == ({"damaged tar": 1} if damaged else {})
    if damaged:
        with pytest.raises(data.ShardError, match=r"a\.tar' is damaged: .* the end of the archive"):
            one_pass(shard, on_error="stop")


def test_damage_costs_the_sample_of_the_torn_file(tmp_path):
    """Without the torn file it may have other captions, no group or no teacher features."""
    path = write(tmp_path / "torn.tar", [sample(0), sample(1)])
    os.truncate(path, member(path, "k001.txt").offset_data + 1)
    found, skipped = one_pass(path)
    assert (found, skipped.counts) == (["k000"], {"damaged tar": 1})


@pytest.mark.parametrize("why", ["No such file", "Permission denied"])
def test_a_shard_that_cannot_be_read_ends_the_loader_and_names_itself(tmp_path, why):
    """It may be a disk or network that fails for a while: a resumed run goes on."""
    path = write(tmp_path / "odd.tar", [sample(0)])
    whole = write(tmp_path / "whole.tar", [sample(i) for i in range(9)])
    reader = loader([path, whole])
    user = os.geteuid()
    if why == "No such file":
        os.unlink(path)
    else:
        os.chmod(path, 0)
        os.seteuid(user or 65534)  # root can read every file
    try:
        with pytest.raises(data.ShardError, match=rf"shard '.*odd\.tar' cannot be read: {why}"):
            list(reader)
    finally:
        os.seteuid(user)


def test_dataset_size_is_that_of_a_meta_json_that_fits(tmp_path):
    path = write(tmp_path / "a.tar", [sample(i) for i in range(6)])
    assert data.dataset_size(path) is None

    def list_samples(number, size):
        entry = {"samples": number, "bytes": size}
        content = {"splits": {"train": {"shards": {"a.tar": entry}}}}
        (tmp_path / "meta.json").write_text(json.dumps(content))

    size = os.path.getsize(path)
    list_samples(8, size)
    assert data.dataset_size(path) == 8
    assert data.dataset_size([path, {"shards": path, "weight": 2.5}]) == 28
    assert data.dataset_size([path, f"pipe:cat {path}"]) is None
    assert data.dataset_size({"shards": path, "weight": 0.01}) is None  # less than one
    list_samples(0, size)
    assert data.dataset_size(path) is None
    list_samples(8, size + 512)  # of another file
    assert data.dataset_size(path) is None


def test_reading_holds_one_sample(tmp_path):
    path = write(tmp_path / "a.tar", [(f"{i:05d}", {"txt": b"x" * 9000}) for i in range(500)])
    tracemalloc.start()
    count = sum(1 for _ in read_tar(data.sources_of(path)[0], Skipped()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 500
    assert peak < 1 << 20
