"""Valid samples, and every kind of damage to a sample or its shard."""

import io
import json
import os
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from pairs import SIZE, keys, loader, png, resize, sample, text_of, write
from PIL import Image

from simplclip import data
from simplclip.data import parts, shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def one(tmp_path, files, **options):
    """Returns the batch of a shard with one sample."""
    (batch,) = loader(write(tmp_path / "a.tar", [("a", files)]), batch_size=1, **options).epoch(0)
    return batch


@pytest.mark.parametrize(
    ("suffix", "form"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG")]
)
def test_image_kinds(tmp_path, suffix, form):
    batch = one(tmp_path, {suffix: png(form=form), "txt": b"one"})
    assert text_of(batch["text"][0]) == "one"
    assert batch["meta"] == [{}]


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b" one \n"}, "one"),
        ({"json": b'{"caption": "two"}', "txt": b"one"}, "two"),
        ({"json": b'{"captions": ["three", "", 3]}', "txt": b"one"}, "three"),
        ({"json": b'{"captions": [], "caption": ""}', "txt": b"one"}, "one"),
        ({"json": '{"caption": "zwölf"}'.encode()}, "zwölf"),
    ],
)
def test_where_captions_come_from(tmp_path, files, caption):
    assert text_of(one(tmp_path, {"png": png()} | files)["text"][0]) == caption


def test_transparent_images_are_composed_on_white(tmp_path):
    clear = io.BytesIO()
    Image.new("RGBA", (12, 12), (0, 0, 0, 0)).save(clear, "PNG")
    batch = one(tmp_path, {"png": clear.getvalue(), "txt": b"one"}, transform=resize)
    assert torch.equal(batch["image"], torch.ones(1, 3, SIZE, SIZE))


def test_groups(tmp_path):
    plain = {"png": png(), "txt": b"x"}
    same = plain | {"json": b'{"group": "cat"}'}
    write(tmp_path / "a.tar", [("a", same), ("b", plain)])
    write(tmp_path / "b.tar", [("c", same), ("b", plain), ("cat", plain)])
    batches = list(loader(str(tmp_path / "*.tar"), batch_size=5, shuffle=False).epoch(0))
    groups = batches[0]["group"].tolist()
    assert groups[0] == groups[2]  # both name the group "cat"
    assert len(set(groups)) == 4  # equal keys in two shards are two samples, and a key is not a group's name
    assert all(0 <= group < 2**63 for group in groups)
    # The hash is pinned, since it must be the same in every process and version.
    assert groups[0] == shards.stable_hash("group/cat") >> 1 == 5663915147306578298


def bomb(side):
    """Returns a PNG whose header claims side x side pixels."""
    small = bytearray(png())
    small[16:24] = side.to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


DAMAGE = {
    "truncated image": {"png": png(size=(64, 64))[:2000], "txt": b"x"},
    "truncated image (jpg)": {"jpg": png(size=(64, 64), form="JPEG")[:900], "txt": b"x"},
    "not an image": {"png": b"hello", "txt": b"x"},
    "not an image (empty)": {"png": b"", "txt": b"x"},
    "image too large": {"png": bomb(60000), "txt": b"x"},
    "image too large (where Pillow only warns)": {"png": bomb(10000), "txt": b"x"},
    "missing image": {"txt": b"x"},
    "missing caption": {"png": png()},
    "missing caption (json)": {"png": png(), "json": b'{"group": 1}'},
    "empty caption": {"png": png(), "txt": b" \n"},
    "empty caption (json)": {"png": png(), "json": b'{"captions": ["", " "]}'},
    "caption not UTF-8": {"png": png(), "txt": b"\xff\xfe\xff"},
    "bad json": {"png": png(), "json": b'{"caption": ', "txt": b"x"},
    "bad json (list)": {"png": png(), "json": b"[1]", "txt": b"x"},
}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_skipped_and_counted(tmp_path, workers):
    broken = [(f"broken{i}", files) for i, files in enumerate(DAMAGE.values())]
    good = [sample(i) for i in range(len(broken))]
    path = write(tmp_path / "a.tar", [pair for pairs in zip(good, broken) for pair in pairs])
    reader = loader(path, workers=workers, drop_last=False)
    expected = Counter(reason.split(" (")[0] for reason in DAMAGE)
    for epoch in range(2):  # each epoch counts anew
        assert sorted(keys(reader.epoch(epoch))) == [key for key, _ in good]
        assert reader.skipped == expected
    (report,) = reader.report().splitlines()
    assert f"{len(good)} samples used, {len(broken)} skipped" in report
    assert all(f"{count} {reason} (first: a.tar/broken" in report for reason, count in expected.items())


def test_a_double_file_is_counted_and_the_first_one_used(tmp_path):
    files = [("a", {"png": png(), "txt": b"first"}), ("a", {"txt": b"second"})]
    reader = loader(write(tmp_path / "a.tar", files), batch_size=1)
    (batch,) = reader.epoch(0)
    assert text_of(batch["text"][0]) == "first"
    assert reader.skipped == {"duplicate file in tar": 1}


def member(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["inside a file", "inside a header", "between files", "garbage header"])
def test_samples_before_a_tear_are_used(tmp_path, where, workers):
    path = write(tmp_path / "torn.tar", [sample(i) for i in range(6)])
    other = write(tmp_path / "whole.tar", [sample(i) for i in range(6, 9)])
    start = member(path, "k004.png").offset
    os.truncate(path, start + {"inside a file": tarfile.BLOCKSIZE + 10, "inside a header": 100}.get(where, 0))
    if where == "garbage header":
        with open(path, "ab") as file:
            file.write(b"\x17" * 4096)
    reader = loader([path, other], workers=workers, drop_last=False)
    assert sorted(keys(reader.epoch(0))) == [f"k{i:03d}" for i in (0, 1, 2, 3, 6, 7, 8)]
    assert reader.skipped == {"torn tar": 1}
    assert "torn.tar" in reader.report()


@pytest.mark.parametrize(("torn", "workers", "usable"), [("k001.txt", 0, 2), ("k005.png", 3, 5)])
def test_a_tear_is_counted_once_and_costs_no_usable_sample(tmp_path, torn, workers, usable):
    path = write(tmp_path / "torn.tar", [sample(i) for i in range(int(torn[3]) + 1)])
    os.truncate(path, member(path, torn).offset_data + 1)
    reader = loader(path, workers=workers, batch_size=1)
    assert sorted(keys(reader.epoch(0))) == [f"k{i:03d}" for i in range(usable)]
    assert reader.skipped == {"torn tar": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("why", ["missing", "no permission", "not a tar", "empty file", "torn first header"])
def test_a_shard_that_cannot_be_opened_names_itself(tmp_path, workers, why, monkeypatch):
    path = Path(write(tmp_path / "odd.tar", [sample(0)]))
    whole = write(tmp_path / "whole.tar", [sample(i) for i in range(9)])
    monkeypatch.setattr(parts, "RETRIES", (0.01,))
    reader = loader([str(path), whole], workers=workers, on_error="stop")
    skipping = loader([str(path), whole], workers=workers)
    user = os.geteuid()
    if why == "missing":
        path.unlink()
    elif why == "no permission":
        path.chmod(0)
        os.seteuid(user or 65534)  # root can read every file
    else:
        path.write_bytes({"not a tar": b"hello" * 999, "empty file": b""}.get(why, path.read_bytes()[:300]))
    start = time.monotonic()
    try:
        with pytest.raises(data.ShardError, match=r"shard '.*odd\.tar' cannot be opened: .+") as caught:
            list(reader.epoch(0))
        with pytest.raises(data.ShardError, match="odd.tar"):
            next(shards.read_shard(str(path), shards.Skipped()))
        os.seteuid(user)
        path.unlink(missing_ok=True) if why == "no permission" else None
        assert len(keys(skipping.epoch(0))) == 8
        assert skipping.skipped == {"unreadable shard": 1}
        assert "odd.tar" in skipping.report()
    finally:
        os.seteuid(user)
    assert "Traceback" not in str(caught.value)
    assert ("Permission" in str(caught.value)) == (why == "no permission")
    assert time.monotonic() - start < 20


def test_batches_per_epoch_comes_from_meta_json_if_it_fits(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [sample(i) for i in range(6)])
    assert loader(path, batch_size=4).batches_per_epoch == 1
    assert loader(path, batch_size=4, drop_last=False).batches_per_epoch == 2
    entry = {"samples": 80, "bytes": os.path.getsize(path)}
    (tmp_path / "meta.json").write_text(json.dumps({"splits": {"train": {"shards": {"a.tar": entry}}}}))
    assert loader(path, batch_size=4).batches_per_epoch == 20
    monkeypatch.setattr(shards, "COUNT_LIMIT", 0)
    assert loader(path, batch_size=4).batches_per_epoch == 20
    os.truncate(path, os.path.getsize(path) - 512)  # the shard is no longer the file that was listed
    assert loader(path, batch_size=4).batches_per_epoch is None
