"""The samples that each of several ranks reads of the same data. The ranks are threads."""

import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from simplclip import data
from simplclip.data.epoch import Share


class Board:
    """An exchange of values between threads."""

    def __init__(self, ranks):
        self.ranks, self.said, self.change = ranks, {}, threading.Condition()

    def of(self, rank):
        def exchange(name, value):
            names = [(name, other) for other in range(self.ranks)]
            with self.change:
                self.said[name, rank] = value
                self.change.notify_all()
                assert self.change.wait_for(lambda: all(one in self.said for one in names), timeout=20)
                return [self.said[one] for one in names]

        return Share(rank, self.ranks, exchange)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Writes 72 samples. The second shard has six broken pictures; the third has two, one of them its last."""
    folder = tmp_path_factory.mktemp("shards")
    for number, broken in enumerate(([], [0, 1, 2, 3, 9, 14], [11, 23])):
        path = tiny.write_shard(folder / f"{number}.tar")
        with tarfile.open(path) as tar, open(path, "r+b") as file:
            pictures = [member for member in tar if member.name.endswith("png")]
            for at in broken:
                file.seek(pictures[at].offset_data)
                file.write(bytes(40))
    return [str(folder / f"{number}.tar") for number in range(3)]


def loader(shards, **options):
    options = {"batch_size": 12, "seed": 3, "shuffle_buffer": 30} | options
    return data.make_loader(
        shards, tokenizer=lambda texts: torch.zeros(len(texts), 1), transform=lambda image: torch.zeros(1), **options
    )


def read(shards, ranks, *where, **options):
    """Returns the keys of each batch by rank, and the loaders."""
    board = Board(ranks)
    loaders = [loader(shards, share=board.of(rank) if ranks > 1 else None, **options) for rank in range(ranks)]

    def one(loader):
        return [[f"{key}-{group}" for key, group in zip(b["key"], b["group"].tolist())] for b in loader.epoch(*where)]

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, loaders)), loaders


@pytest.mark.parametrize("ranks", [2, 3, 12])
@pytest.mark.parametrize("epoch", range(2))
def test_batches_are_those_of_one_process(shards, ranks, epoch):
    """In each batch the ranks have the samples of one process in its order, each sample once, although some are broken."""
    (expected,), (one,) = read(shards, 1, epoch)
    assert len(expected) == 5
    got, loaders = read(shards, ranks, epoch)
    assert [[key for rank in got for key in rank[batch]] for batch in range(5)] == expected
    assert {loader.report() for loader in loaders} == {one.report()}
    assert "8 skipped" in one.report()
    assert {str(loader.state()) for loader in loaders} == {str(one.state())}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3), (2, 6)])
def test_another_number_of_ranks_goes_on(shards, before, after):
    """Loading resumes from a state that any rank saved, with another number of ranks."""
    (expected,), _ = read(shards, 1, 2)
    board = Board(before)
    for skip in range(1, 5):
        loaders = [loader(shards, share=board.of(rank) if before > 1 else None) for rank in range(before)]
        with ThreadPoolExecutor(before) as pool:
            list(pool.map(lambda one, skip=skip: [*zip(range(skip), one.epoch(2))], loaders))
        got, _ = read(shards, after, 2, skip, loaders[-1].state())
        assert [[key for rank in got for key in rank[batch]] for batch in range(5 - skip)] == expected[skip:]


def test_the_rows_of_other_ranks_are_not_decoded(shards):
    """Other ranks' rows are decoded only for a partial batch of a worker, which is joined with those of other workers."""
    decoded = []
    options = {
        "tokenizer": lambda texts: torch.zeros(len(texts), 1),
        "transform": lambda i: decoded.append(1) or torch.zeros(1),
    }
    board = Board(2)
    loaders = [data.make_loader(shards[:1], batch_size=12, share=board.of(rank), **options) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: [*one.epoch(0)], loaders))
    assert len(decoded) == 24


def test_ranks_with_other_data_end(shards):
    board = Board(2)
    loaders = [loader(shards[rank : rank + 1], share=board.of(rank)) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool, pytest.raises(data.ShardError, match="the ranks read different samples"):
        list(pool.map(lambda one: [*one.epoch(0)], loaders))


def test_batches_that_cannot_be_divided(shards):
    for options in ({"batch_size": 10}, {"drop_last": False}):
        with pytest.raises(ValueError, match="batch_size: expected a multiple of the 4 ranks, with drop_last, got"):
            loader(shards, share=Board(4).of(0), **options)


def test_the_last_samples_of_the_workers_are_divided(shards):
    ends = [{"key": list("abcdefg")}, {"key": list("hijklmn")}]
    loaders = [loader(shards, share=Board(3).of(rank)) for rank in range(3)]
    got = [[(batch["key"], size) for batch, size in one._merged(ends, 12)] for one in loaders]
    assert got == [[(list("abcd"), 12)], [(list("efgh"), 12)], [(list("ijkl"), 12)]]
