"""Held-out data: the same images in the same order, whatever the workers; damage; pictures."""

import gc
import multiprocessing
import time

import pytest
import torch
from pairs import COUNT, SIZE, augment, png, resize, sample, write

from simplclip import data
from simplclip.data.broken import Skipped

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard, (start, stop) in enumerate(((0, 5), (5, 19), (19, COUNT))):
        write(folder / f"held-{shard}.tar", [sample(i) for i in range(start, stop)])
    return str(folder / "held-*.tar")


def read(what, workers=0, batch_size=4, transform=augment):
    skipped = Skipped()
    batches = list(data.held_out(what).batches(transform, batch_size, skipped, workers))
    return batches, skipped


@pytest.mark.parametrize("workers", [0, 3])
def test_the_whole_split_in_order_whatever_the_workers(pattern, workers):
    batches, skipped = read(pattern, workers)
    assert not skipped.counts
    assert [len(images) for images, _, _ in batches] == [4] * 5 + [3]
    assert [position for _, positions, _ in batches for position in positions] == [*range(COUNT)]
    assert [entry.key for _, _, entries in batches for entry in entries] == [f"k{i:03d}" for i in range(COUNT)]
    assert all(entry.captions == [f"{entry.key[1:].lstrip('0') or 0} a"] for _, _, entries in batches for entry in entries)
    assert all(entry.encoded == b"" for _, _, entries in batches for entry in entries)
    images = torch.cat([images for images, _, _ in batches])
    assert images.shape == (COUNT, 3, SIZE, SIZE)
    again = torch.cat([images for images, _, _ in read(pattern, 0)[0]])
    assert torch.equal(images, again)


@pytest.mark.parametrize("workers", [0, 3])
def test_broken_samples_are_counted_once_and_leave_the_order(tmp_path, workers):
    broken = {
        3: {"png": b"not an image", "txt": b"x"},
        4: {"png": png(4)},
        7: {"txt": b"x"},
        9: {"png": png(9)[:80], "txt": b"x"},
        10: {"png": png(10), "json": b"{"},
        11: {"png": png(11), "txt": b" "},
        12: {"png": png(12), "cls": b"many"},
    }
    samples = [(f"k{i:03d}", broken.get(i, {"png": png(i), "txt": b"fine"})) for i in range(14)]
    write(tmp_path / "a.tar", samples)
    torn = tmp_path / "b.tar"
    write(torn, [(f"t{i}", {"png": png(i), "txt": b"fine"}) for i in range(5)])
    torn.write_bytes(torn.read_bytes()[:5200])
    batches, skipped = read(str(tmp_path / "*.tar"), workers, batch_size=2)
    reasons = ("not an image", "missing caption", "missing image", "truncated image", "bad json", "empty caption", "bad cls")
    assert {reason: skipped.counts[reason] for reason in reasons} == dict.fromkeys(reasons, 1)
    assert skipped.counts["torn tar"] == 1
    assert "a.tar/k003" in skipped.examples["not an image"]
    found = [entry.key for _, _, entries in batches for entry in entries]
    assert found[:7] == [f"k{i:03d}" for i in (0, 1, 2, 5, 6, 8, 13)]
    assert set(found[7:]) <= {"t0", "t1", "t2"}


def test_errors(tmp_path, pattern):
    with pytest.raises(data.EmptyEpochError, match="no usable sample.*1 missing image"):
        read(write(tmp_path / "b.tar", [("d", {"txt": b"x"})]))
    (tmp_path / "c.tar").write_bytes(b"nothing" * 1000)
    for workers in (0, 2):
        with pytest.raises(data.ShardError, match="c.tar"):
            read(str(tmp_path / "c.tar"), workers)

    def bad(image):
        raise KeyError("why")

    for workers in (0, 2):
        with pytest.raises(RuntimeError, match=r"the transform failed on sample 'held-0.tar/k000': KeyError: 'why'"):
            read(pattern, workers, transform=bad)


@pytest.mark.parametrize("fails", ["the reader", "its caller"])
def test_the_garbage_collector_does_not_wait_for_processes(pattern, fails):
    """An error and the frames in its traceback are a cycle. torch would wait 5 s for each process of an iterator in it."""

    def transform(image):
        if fails == "the reader":
            raise KeyError("why")
        return torch.zeros(3, 4, 4)

    def use():
        batches = data.held_out(pattern).batches(transform, 4, Skipped(), 2)
        try:
            next(batches)
            raise ValueError
        except (RuntimeError, ValueError) as error:
            kept = error  # noqa: F841

    use()
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 4
    assert not multiprocessing.active_children()


def test_pictures_reads_what_is_asked_for(pattern, monkeypatch):
    found = data.held_out(pattern)
    opened = []
    kind, real = type(found), type(found).open
    monkeypatch.setattr(kind, "open", lambda self, item: opened.append(1) or real(self, item))
    shown = found.pictures([7, 2, 7, 21])
    assert len(opened) == 3
    assert [*shown] == [2, 7, 21]
    monkeypatch.setattr(kind, "open", real)
    pixels = read(pattern, transform=resize, batch_size=COUNT)[0][0][0]
    for position, image in shown.items():
        assert torch.equal(resize(image), pixels[position])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_fetched_once_whatever_the_workers(pattern, tmp_path, workers):
    shard = pattern.replace("*", "1")
    batches, _ = read(f"pipe:echo once >> {tmp_path / 'log'} && cat {shard}", workers)  # killed when the tar ends
    assert [entry.key for _, _, entries in batches for entry in entries] == [f"k{i:03d}" for i in range(5, 19)]
    assert (tmp_path / "log").read_text() == "once\n"
