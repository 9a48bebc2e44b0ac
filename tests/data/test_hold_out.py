"""A share of the data is held out: the same samples for every reader, groups together."""

import json
from collections import Counter
from pathlib import Path

import pytest

from simplclip import data
from simplclip.data import pack, samples
from support.data.packs import write_images
from support.data.pairs import (
    COUNT,
    first_passes,
    loader,
    members,
    png,
    resize,
    sample,
    table,
    write,
)
from support.evaluation import batches_of, index_of

SHARE = 0.3


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """Writes groups of two neighbours, one of which lies in two shards, and a broken json."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (start, stop) in enumerate(((0, 5), (5, 19), (19, COUNT))):
        write(folder / f"train-{shard}.tar", [sample(i) for i in range(start, stop)])
    write(
        folder / "train-3.tar",
        [("a", {"png": png(), "json": b"{"}), ("b", {"png": png(), "txt": b"alone"})],
    )
    return str(folder / "train-*.tar")


def held_of(shards, share=SHARE, workers=0, **more):
    split = data.held_out({"shards": shards, "hold_out": share, **more})
    batches, skipped = batches_of(split, resize, 4, workers)
    return [row.key for batch in batches for row in batch.rows], skipped, split


def one_pass(shards, share, workers=1, ranks=1, **options):
    """Returns the keys of the first pass of each worker and rank."""
    found = []
    options |= {"workers": workers, "world_size": ranks, "batch_size": 1, "hold_out": share}
    for rank in range(ranks):
        reader = loader(shards, rank=rank, **options)
        for worker in range(workers):
            for block in first_passes(reader, worker, workers):
                found += block.batch["key"]
    return found


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (3, 2)])
def test_training_and_evaluation_divide_the_samples(pattern, workers, ranks):
    held, skipped, split = held_of(pattern)
    trained = one_pass(pattern, SHARE, workers, ranks)
    everything = [f"k{i:03d}" for i in range(COUNT)] + ["b"]
    assert sorted(held + trained) == sorted(everything)
    assert 3 <= len(held) <= 12
    groups = [{int(key[1:]) // 2 for key in side if key != "b"} for side in (held, trained)]
    assert not groups[0] & groups[1]
    assert held_of(pattern, workers=2)[0] == held
    assert not skipped.counts, "the broken sample is training's, which counts it"
    assert {*held} < {*held_of(pattern, 0.6)[0]}, "a larger share has the samples of a smaller one"
    assert [*split.pictures([1, 3])] == [1, 3]
    assert len(one_pass(pattern, 0.0, workers, ranks)) == COUNT + 1


def test_the_share_is_about_the_share(tmp_path):
    shard = write(tmp_path / "a.tar", [(str(i), {"png": png(), "txt": b"x"}) for i in range(1000)])
    assert 70 <= len(held_of(shard, 0.1)[0]) <= 130


def test_groups_of_a_sidecar_count(tmp_path):
    """They replace those of the shard's json, in training and in evaluation."""
    shard = write(tmp_path / "a.tar", [(f"{i:02}", {"png": png(), "txt": b"x"}) for i in range(40)])
    (tmp_path / "side").mkdir()
    records = [
        (f"{i:02}", {"json": json.dumps({"caption": "y", "group": i // 10}).encode()})
        for i in range(40)
    ]
    write(tmp_path / "side/a.tar", records)
    folders = [str(tmp_path / "side")]
    held = held_of(shard, 0.5, sidecars=folders)[0]
    assert {Counter(int(key) // 10 for key in held)[group] for group in range(4)} <= {0, 10}
    trained = one_pass(shard, 0.5, sidecars=folders)
    assert sorted(held + trained) == [f"{i:02}" for i in range(40)]


SOURCES = [f"{year}/IMG_{number:04}.v2" for year in (2019, 2020) for number in range(20)]


def test_copies_of_a_collection_hold_out_the_same_pictures(tmp_path):
    """A copy has other images, another name and one picture more."""
    folder_of(tmp_path / "photos", SOURCES)
    folder_of(tmp_path / "on_white", ["2018/new", *reversed(SOURCES)])
    held = {}
    for name in ("photos", "on_white"):
        shards = shards_of(tmp_path / name)
        keys_held = held_of(shards)[0]
        records = {
            member.partition(".")[0]: json.loads(content)["source"]
            for shard in shards
            for member, content in members(shard).items()
            if member.endswith(".json")
        }
        held[name] = {records[key].partition("/")[2] for key in keys_held} - {"2018/new"}
        trained = one_pass(shards, SHARE)
        assert sorted(keys_held + trained) == [*records]
    assert held["photos"] == held["on_white"]
    assert 5 <= len(held["photos"]) <= 20


@pytest.mark.parametrize(
    ("record", "picture"),
    [
        ({"source": "photos/2019/a"}, "2019/a"),
        ({"source": "captions_val2017.json/0001.jpg"}, "0001"),
        ({"source": "photos/a.v2"}, "a.v2"),
        ({"source": "flickr"}, None),
        ({"source": "https://host/a.jpg"}, None),
        ({"source": "photos/"}, None),
        ({"source": ["photos/a"]}, None),
        ({}, None),
    ],
)
def test_the_path_of_a_picture_in_its_collection(record, picture):
    content = json.dumps(record).encode()
    sides = [
        samples.is_held_out({"__shard__": shard, "__key__": "a", "json": content}, 0.5)
        for shard in map(str, range(20))
    ]
    assert len({*sides}) == (2 if picture is None else 1)


def shards_of(source):
    out = source.parent / "out" / source.stem
    return pack.pack(source, out, workers=1, progress=False)


def folder_of(path, names):
    write_images(path, *(f"{name}.png" for name in names))
    for number, name in enumerate(names):
        (path / f"{name}.txt").write_text(f"caption {number}")


def test_rows_of_an_image_that_are_no_neighbours_are_a_group(tmp_path):
    """They stay together in a hold-out; an image in front changes no other image's side."""
    write_images(tmp_path, *(f"{number}.png" for number in range(21)))
    numbers = [*range(20), *range(20)]
    held = []
    for name, images in (("t", numbers), ("more", [20, *numbers])):
        lines = [(f"{n}.png", f"row {i}") for i, n in enumerate(images)]
        path = table(tmp_path / f"{name}.csv", lines)
        shards = shards_of(Path(path))
        rows = {int(key) for key in held_of(shards)[0]}
        pictures = {images[row] for row in rows}
        assert rows == {row for row, image in enumerate(images) if image in pictures}
        held.append(pictures - {20})
        index = index_of(data.held_out(path))
        groups = [[*dict.fromkeys(images)].index(image) for image in images]
        assert index.groups.tolist() == index.caption_groups.tolist() == groups
    assert held[0] == held[1]
    assert 0 < len(held[0]) < 20
