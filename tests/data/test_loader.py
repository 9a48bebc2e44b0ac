"""Batches of training: parts of workers and ranks, resuming, broken data."""

import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from simplclip import data
from support.data.pairs import (
    COUNT,
    SIZE,
    first_passes,
    keys,
    loader,
    png,
    resize,
    sample,
    take,
    text_of,
    write,
)
from support.train.runs import bits

ALL = [f"k{i:03d}" for i in range(COUNT)]
ALL_43 = [f"k{i:03d}" for i in range(43)]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """Writes seven shards of unequal size."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (start, stop) in enumerate(itertools.pairwise((0, 1, 3, 8, 10, 14, 19, COUNT))):
        write(folder / f"train-{shard:06d}.tar", [sample(i) for i in range(start, stop)])
    return str(folder / "train-{000000..000006}.tar")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write(tmp_path_factory.mktemp("one") / "one.tar", [sample(i) for i in range(COUNT)])


def passes(shards, count, *, workers=1, ranks=1, **options):
    """Returns the keys of the first passes of each worker of each rank: keys[pass][worker]."""
    keys = [[] for _ in range(count)]
    options = {"batch_size": 1, "shuffle_buffer": 4, "transform": resize} | options
    for rank in range(ranks):
        pairs = loader(shards, workers=workers, rank=rank, world_size=ranks, **options)
        for worker in range(workers):
            for of_pass in keys:
                of_pass.append([])
            for block in first_passes(pairs, worker, workers, count):
                keys[block.place.epoch][-1] += block.batch["key"]
    return keys


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_the_shards_hold(pattern, workers):
    batches = take(loader(pattern, workers=workers), 8)
    assert {len(b["key"]) for b in batches} == {4}
    for batch in batches:
        found = [(batch[name].shape, batch[name].dtype) for name in ("image", "text", "group")]
        assert found[0] == ((4, 3, SIZE, SIZE), torch.float32)
        assert found[1:] == [((4, 12), torch.int64), ((4,), torch.int64)]
        for key, row, record in zip(batch["key"], batch["text"], batch["meta"]):
            assert text_of(row) in record["captions"]
            assert record["group"] == int(key[1:]) // 2


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shards", ["many", "one"])
def test_in_a_pass_no_sample_is_lost_doubled_or_shared(pattern, one, shards, workers, ranks):
    found = passes(pattern if shards == "many" else one, 3, workers=workers, ranks=ranks)
    for of_pass in found:
        assert sorted(key for of_worker in of_pass for key in of_worker) == ALL
        assert all(of_pass)
    assert found[0] != found[1]


def test_shuffle_mixes_shards_and_differs_by_pass_and_seed(pattern):
    orders = [passes(pattern, 2, seed=seed, shuffle_buffer=COUNT) for seed in (0, 1)]
    orders = {tuple(keys) for of_seed in orders for (keys,) in of_seed}
    assert len(orders - {tuple(ALL)}) == 4
    assert passes(pattern, 2, shuffle=False) == [[ALL], [ALL]]


@pytest.mark.slow
def test_weights_say_how_often_shards_come(pattern, one):
    mixed = [{"shards": one, "weight": 2.25}, {"shards": pattern, "weight": 0.5}]
    counts = Counter(key for of_pass in passes(mixed, 40) for key in of_pass[0])
    assert all(abs(count - 40 * 2.75) < 40 for count in counts.values())
    options = {"shuffle_buffer": 2 * COUNT, "batch_size": 2 * COUNT}
    (twice,) = take(loader({"shards": one, "weight": 2}, **options), 1)
    assert Counter(twice["key"]) == Counter(ALL * 2)
    images = {image.numpy().tobytes() for image in twice["image"]}
    assert len(images) > COUNT, "an augmentation of each copy"


@pytest.mark.slow
def test_small_data_give_the_same_batches_with_any_number_of_workers(tmp_path):
    for shard, (start, stop) in enumerate(((0, 5), (5, 30), (30, 40))):
        write(tmp_path / f"{shard}.tar", [sample(i) for i in range(start, stop)])
    found = []
    for workers in (0, 3):
        reader = loader(str(tmp_path / "*.tar"), batch_size=20, workers=workers)
        batches = take(reader, 7)
        assert [len({*batch["key"]}) for batch in batches] == [20] * 7
        found.append(bits(batches))
    assert found[0] == found[1]


@pytest.mark.parametrize("workers", [0, 3])
def test_broken_samples_are_counted_once_an_epoch_and_leave_no_batch_short(tmp_path, workers):
    samples = [broken(i) if i in (2, 9, 10) else sample(i) for i in range(43)]
    path = write(tmp_path / "a.tar", samples)

    def make(state=None):
        return loader(path, state, batch_size=10, workers=workers)

    reader = make()
    batches = take(reader, 12)
    assert {len(batch["key"]) for batch in batches} == {10}
    counts = Counter(keys(batches))
    assert {*counts} == {*ALL_43} - {"k002", "k009", "k010"}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert 6 <= reader.skipped.counts["missing caption"] <= 12
    again = take(make(reader.state_dict()), 3)
    assert bits(again) == bits(take(reader, 3))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shards", ["many", "one"])
def test_a_resumed_loader_goes_on_exactly(pattern, one, shards, workers):
    """The cuts are in the first pass, at its end, and in later ones; a state is plain ints."""
    ranks = 2 if workers else 1
    ranked = {"workers": workers, "world_size": ranks, "rank": ranks - 1}
    options = ranked | {"shuffle_buffer": 5, "batch_size": 3}

    def make(state=None):
        return loader(pattern if shards == "many" else one, state, **options)

    reader = make()
    states = []
    whole = []
    for batch in itertools.islice(reader, 24):
        whole.append(batch)
        states.append(json.loads(json.dumps(reader.state_dict())))
    for cut in (1, 17) if workers else (1, 4, 17):
        assert bits(take(make(states[cut - 1]), 24 - cut)) == bits(whole[cut:])
    assert bits(take(reader, 2)) == bits(take(make(states[-1]), 2))  # iterating again goes on, too


def test_what_was_consumed_is_not_decoded_again(pattern):
    calls = Counter()

    def counted(image):
        calls["decoded"] += 1
        return resize(image)

    reader = loader(pattern, transform=counted, batch_size=3)
    take(reader, 20)
    calls.clear()
    take(loader(pattern, reader.state_dict(), transform=counted, batch_size=3), 1)
    assert calls["decoded"] == 3


@pytest.mark.parametrize(
    "other", [{"workers": 2}, {"world_size": 2}, {"rank": 1, "world_size": 2}, {"seed": 5}]
)
def test_a_state_of_another_loader_is_refused(pattern, other):
    with pytest.raises(ValueError, match="state: expected one of (workers|world_size|rank|seed)"):
        loader(pattern, loader(pattern).state_dict(), **other)


def test_a_state_belongs_to_the_names_weights_and_sizes_of_its_shards(tmp_path):
    """Folders that move keep the ends of their paths, by which shards of one file name differ."""
    for number, folder in enumerate(("old/a", "old/b", "old/c")):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / "0.tar", [sample(10 * number + i) for i in range(7)])

    def shards(*folders):
        return [str(tmp_path / folder / "0.tar") for folder in folders]

    reader = loader(shards("old/a", "old/b"))
    take(reader, 5)
    state = json.loads(json.dumps(reader.state_dict()))
    others = [shards(*(f"old/{name}" for name in names)) for names in ("a", "ac", "ba", "abc")]
    for other in (*others, [shards("old/a"), {"shards": shards("old/b"), "weight": 2}]):
        with pytest.raises(ValueError, match="state: expected one of shards_digest "):
            loader(other, state)
    whole = take(reader, 8)
    (tmp_path / "old").rename(tmp_path / "new")
    assert bits(take(loader(shards("new/a", "new/b"), state), 8)) == bits(whole)
    state = loader(shards("new/a", "new/b")).state_dict()
    write(tmp_path / "new/b/0.tar", [sample(i) for i in range(30)])
    with pytest.raises(ValueError, match="state: expected one of shards_digest "):
        loader(shards("new/a", "new/b"), state)


def test_every_caption_is_drawn_and_augmentation_changes_by_pass(pattern):
    drawn, images = Counter(), []
    for batch in take(loader(pattern, batch_size=COUNT), 12):
        drawn.update(text_of(row)[-1] for row in batch["text"])
        images += [batch["image"][i] for i, key in enumerate(batch["key"]) if key == "k003"]
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 12 * COUNT / 6
    assert all(not torch.equal(images[0], image) for image in images[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone_and_change_nothing(pattern, workers):
    def seed(number):
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002

    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    found = []
    for number in (3, 4):
        seed(number)
        expected = draws()
        seed(number)
        found.append(take(loader(pattern, workers=workers), 4))
        assert draws() == expected
    assert bits(found[0]) == bits(found[1])


def test_a_failing_transform_names_the_sample(pattern):
    def fail(image):
        raise TypeError("no such image")

    with pytest.raises(TypeError, match="no such image") as caught:
        take(loader(pattern, transform=fail, shuffle=False), 1)
    (note,) = caught.value.__notes__
    assert re.match(r"The transform failed on sample 'k000' of shard '.*train-000000\.tar'", note)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_usable_sample_say_why(tmp_path, workers):
    path = write(tmp_path / "a.tar", [("broken", {"png": b"", "txt": b"x"})])
    message = r"got none in '.*a\.tar' in 100 epochs; .*not an image \(first: a.tar/broken"
    with pytest.raises(data.EmptyDataError, match=message):
        take(loader(path, workers=workers, batch_size=1), 1)
    with pytest.raises(data.EmptyDataError, match=r"got none in '.*b\.tar' in 100 epochs; 0 "):
        take(loader(write(tmp_path / "b.tar", []), workers=workers), 1)


def broken(number):
    return f"k{number:03d}", {"png": png(number)}


def test_a_broken_shard_does_not_end_the_data(tmp_path):
    """Nor does one that comes in few passes only."""
    write(tmp_path / "bad.tar", [broken(i) for i in range(9)])
    good = write(tmp_path / "good.tar", [sample(i) for i in range(9)])
    reader = loader(str(tmp_path / "*.tar"), workers=2, batch_size=1, transform=resize)
    assert {*keys(take(reader, 30))} == {*ALL[:9]}
    assert reader.skipped.counts["missing caption"] >= 9
    seldom = {"shards": good, "weight": 0.2}
    assert take(loader([seldom, str(tmp_path / "bad.tar")]), 9)
    with pytest.raises(data.EmptyDataError, match=r"got none in '.*good\.tar'"):
        take(loader({"shards": good, "weight": 1e-7}), 1)


def test_a_rank_whose_share_is_always_broken_says_so(tmp_path):
    path = write(tmp_path / "a.tar", [broken(i) if i % 3 == 2 else sample(i) for i in range(9)])
    options = {"world_size": 3, "workers": 2, "batch_size": 1}
    assert take(loader(path, rank=1, **options), 9)
    with pytest.raises(data.EmptyDataError, match=r"in .*a\.tar' in 100 epochs"):
        take(loader(path, rank=2, **options), 9)


@pytest.mark.parametrize(
    ("sizes", "step", "ranks", "workers", "own"),
    [
        ([100] * 4, 10, 1, 4, True),
        ([100] * 4, 11, 1, 4, False),
        ([100] * 3, 1, 1, 4, False),
        ([9], 9, 1, 1, True),
        ([100] * 4, 10, 2, 2, True),
        ([100] * 4, 11, 2, 2, False),
        ([1, 200, 200], 10, 1, 3, True),  # a small tar among large ones
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_workers_have_tars_of_their_own_if_parts_have_ten_steps(
    tmp_path, listed, sizes, step, ranks, workers, own
):
    shards = {}
    for number, size in enumerate(sizes, 1):
        path = tmp_path / f"{len(sizes) - number}.tar"
        write(path, [(f"k{i}", {"png": bytes(4096), "txt": b"x"}) for i in range(size)])
        shards[path.name] = {"samples": size, "bytes": path.stat().st_size}
    if listed:
        (tmp_path / "meta.json").write_text(json.dumps({"splits": {"a": {"shards": shards}}}))
    reader = loader(str(tmp_path / "*.tar"), batch_size=step, world_size=ranks, workers=workers)
    assert reader.own_tars == own
    tars = [f"pipe:cat {tmp_path / '0.tar'}"] * len(sizes)
    streams = loader(tars, batch_size=step, world_size=ranks, workers=workers)
    assert streams.own_tars == (len(sizes) >= ranks * workers)


def test_a_batch_of_more_samples_than_there_are_is_an_error(one):
    shards = {"shards": one, "weight": 1.5}
    for options in (
        {"batch_size": 47},
        {"batch_size": 16, "batches_per_step": 3},
        {"batch_size": 24, "world_size": 2, "workers": 2},
    ):
        total = 48 if len(options) > 1 else 47
        message = f"data.batch_size: expected at most 46, .*, got {total}; lower it or"
        with pytest.raises(ValueError, match=message):
            loader(shards, **options)
    assert len(take(loader(shards, batch_size=46), 1)[0]["key"]) == 46
    assert loader(f"pipe:cat {one}", batch_size=99), "nobody knows what a stream has"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2.5}, "batch_size: expected an integer of at least 1, got 2.5"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"max_bytes": True}, "max_bytes: expected an integer of at least 1, got True"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2"),
    ],
)
def test_bad_counts(pattern, options, message):
    with pytest.raises(ValueError, match=message):
        loader(pattern, **options)
