"""Held-out data: the order, whatever the workers; layouts; damage; pictures."""

import os
from pathlib import Path

import pytest
import torch

from simplclip import data
from simplclip.common.errors import InputError
from support.data.packs import write_images
from support.data.pairs import COUNT, SIZE, augment, png, resize, sample, table, write
from support.evaluation import batches_of

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard, (start, stop) in enumerate(((0, 5), (5, 19), (19, COUNT))):
        write(folder / f"held-{shard}.tar", [sample(i) for i in range(start, stop)])
    return str(folder / "held-*.tar")


def read(what, workers=0, batch_size=4, transform=augment, **options):
    return batches_of(data.held_out(what, **options), transform, batch_size, workers)


def rows(batches):
    return [row for batch in batches for row in batch.rows]


@pytest.mark.parametrize("workers", [0, 3])
def test_the_whole_split_in_order_whatever_the_workers(pattern, workers):
    batches, skipped = read(pattern, workers)
    assert not skipped.counts
    # no batch goes over the end of a tar
    assert [len(batch.images) for batch in batches] == [4, 1, 4, 4, 4, 2, 4]
    assert [row.position for row in rows(batches)] == [*range(COUNT)]
    assert [row.key for row in rows(batches)] == [f"k{i:03d}" for i in range(COUNT)]
    # of a json's the first
    assert all(row.captions == [f"{row.key[1:].lstrip('0') or 0} a"] for row in rows(batches))
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (COUNT, 3, SIZE, SIZE)
    assert torch.equal(images, torch.cat([batch.images for batch in read(pattern, 0)[0]]))
    assert [len(row.captions) for row in rows(read(pattern, captions=0)[0])] == [3] * COUNT


def test_classes_of_folders(tmp_path):
    names = [f"{name}.PNG" for name in ("big_dog/more/0", "big_dog/more/1", "cat/more/0")]
    write_images(tmp_path / "in", *names)
    (tmp_path / "in" / "cat" / "broken.jpg").write_bytes(b"x")
    (tmp_path / "in" / "cat" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in" / "cat" / "pipe.jpg")
    found = data.held_out(tmp_path / "in")
    assert found.classes.names == ["big dog", "cat"]
    for workers in (0, 2):
        batches, skipped = read(tmp_path / "in", workers)
        assert [f"{row.key}.PNG" for row in rows(batches)] == names
        assert [row.label for row in rows(batches)] == [0, 0, 1]
        assert not any(row.captions for row in rows(batches))
        assert skipped.counts == {"not an image": 1, "cannot be read": 2}
    (tmp_path / "empty").mkdir()
    message = "data: expected a folder of images with captions, got .* which has no image"
    with pytest.raises(InputError, match=message):
        data.held_out(tmp_path / "empty")


def test_classes_have_the_order_of_their_folders(tmp_path):
    """As in torchvision's ImageFolder: "_" is behind "T", a space before it."""
    write_images(tmp_path / "set#1", "a_early/0.png", "aTarget/0.png", "b c/0.png", "b_c/0.png")
    (tmp_path / "set#1" / "empty").mkdir()
    held = data.held_out(tmp_path / "set#1")
    assert held.classes.folders == ("aTarget", "a_early", "b c", "b_c", "empty")
    assert held.classes.names == ["aTarget", "a early", "b c", "b c", "empty"]
    assert [row.label for row in rows(read(tmp_path / "set#1")[0])] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_pack_takes_is_read_as_it_is(tmp_path, workers):
    """All captions of a row count; of a json beside an image the first one, as in shards."""
    write_images(tmp_path / "texts", "a.png", "b.png")
    (tmp_path / "texts/a.txt").write_text("one\n two")
    (tmp_path / "texts/b.json").write_text('{"captions": ["first", "second"], "label": "cat"}')
    lines = [(f"texts/{name}.png", f"{name} {which}") for name in "ab" for which in (1, 2)]
    table(tmp_path / "rows.csv", [*lines, ("texts/none.png", "x")])
    batches, skipped = read(tmp_path / "texts", workers)
    found = [(row.captions, row.label) for row in rows(batches)]
    assert found == [(["one two"], None), (["first"], "cat")]
    batches, skipped = read(tmp_path / "rows.csv", workers, batch_size=2)
    found = [(row.key, row.captions) for row in rows(batches)]
    assert found == [("000000000", ["a 1", "a 2"]), ("000000002", ["b 1", "b 2"])]
    assert skipped.examples["cannot be read"].startswith("rows.csv/000000004")
    batches, _ = read(tmp_path / "rows.csv", captions=1)
    assert [row.captions for row in rows(batches)] == [["a 1"], ["b 1"]]
    assert [*data.held_out(tmp_path / "rows.csv").pictures([1])] == [1]
    with pytest.raises(InputError, match="held: expected a table with a column"):
        data.held_out(table(tmp_path / "other.csv", lines, ("x", "y")), name="held")


def clip_benchmark(folder, **files):
    folder.mkdir(parents=True)
    write(folder / "0.tar", [("s0", {"png": png(), "txt": b"one\n two\n\n", "cls": b"1"})])
    (folder / "nshards.txt").write_text("1")
    for name, text in files.items():
        (folder.parent / f"{name}.txt").write_text(text)


def test_clip_benchmarks_layout(tmp_path, monkeypatch):
    """Only there each line of a txt is a caption."""
    texts = {"classnames": "a\n b\n", "zeroshot_classification_templates": "a {c}"}
    clip_benchmark(tmp_path / "set" / "test", **texts)
    clip_benchmark(tmp_path / "set" / "val", dataset_type="retrieval")
    for what in (tmp_path / "set", tmp_path / "set" / "test"):
        found = data.held_out(what)
        assert (found.classes.names, found.classes.templates) == (["a", "b"], ["a {c}"])
        (row,) = rows(read(what)[0])
        assert (row.captions, row.label) == (["one", "two"], 1)
    assert "val/0.tar" in str(data.held_out(tmp_path / "set" / "val"))
    assert rows(read(tmp_path / "set" / "test" / "0.tar")[0])[0].captions == ["one two"]
    messages = {"2": "expected files, got '.*1.tar', which", "9" * 5000: "number of shards, got"}
    for number, message in messages.items():
        Path(tmp_path, "set", "test", "nshards.txt").write_text(number)
        with pytest.raises(InputError, match=message):
            data.held_out(tmp_path / "set" / "test")


def test_pictures_are_those_at_the_positions(pattern):
    shown = data.held_out(pattern).pictures([7, 2, 7, 21])
    assert [*shown] == [2, 7, 21]
    pixels = torch.cat([batch.images for batch in read(pattern, transform=resize)[0]])
    for position, image in shown.items():
        assert torch.equal(resize(image), pixels[position])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_fetched_once_whatever_the_workers(pattern, tmp_path, workers):
    shard = pattern.replace("*", "1")
    batches, _ = read(f"pipe:echo once >> {tmp_path / 'log'} && cat {shard}", workers)
    assert [row.key for row in rows(batches)] == [f"k{i:03d}" for i in range(5, 19)]
    assert (tmp_path / "log").read_text() == "once\n"
