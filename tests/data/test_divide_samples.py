"""How samples are divided among ranks and loader processes: random layouts of data and readers.

To repeat a case: pytest tests/data/test_divide_samples.py --cases 1 --first-case NUMBER
"""

import copy
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from simplclip import data
from simplclip.common.errors import InputError
from simplclip.data import divide_samples
from simplclip.data import loader as loaders
from simplclip.data.samples import is_held_out
from support.data.pairs import keys, loader, png, take, write
from support.train.runs import bits

PROCESSES, RANKS, SAMPLES = "processes", "ranks", "samples"
PICTURE = png(size=(1, 1))
BROKEN = b"no picture"
EPOCHS = 2  # that are read to their ends


@pytest.mark.parametrize(
    ("sizes", "step", "ranks", "workers", "expected"),
    [
        ([10] * 4, 10, 1, 4, PROCESSES),
        ([10] * 4, 11, 1, 4, RANKS),
        ([10] * 4, 99, 1, 1, PROCESSES),  # which reads all alone
        ([10] * 3, 1, 1, 4, RANKS),
        ([10] * 8, 20, 2, 2, PROCESSES),
        ([10] * 8, 21, 2, 2, RANKS),
        ([10] * 8, 41, 2, 2, SAMPLES),
        ([10] * 8, 41, 2, 1, SAMPLES),
        ([10], 1, 2, 1, SAMPLES),
        ([1, 64, 64], 8, 1, 3, RANKS),
        ([1, 128, 128], 8, 1, 3, PROCESSES),  # a small tar among large ones
    ],
)
@pytest.mark.parametrize("known", ["listed", "counted"])
def test_processes_have_tars_of_their_own_if_these_have_a_step(
    tmp_path, monkeypatch, known, sizes, step, ranks, workers, expected
):
    shards = {}
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.tar"
        samples = [(f"k{i}", {"png": PICTURE + bytes(7000), "txt": b"x"}) for i in range(size)]
        write(path, samples)
        shards[path.name] = {"samples": size, "bytes": path.stat().st_size}
    if known == "listed":
        (tmp_path / "meta.json").write_text(json.dumps({"splits": {"a": {"shards": shards}}}))
        monkeypatch.setattr(divide_samples, "count_samples", None)
    monkeypatch.setattr(divide_samples, "_check_step", lambda streams, step: None)
    reader = loader(str(tmp_path / "*.tar"), batch_size=step, world_size=ranks, workers=workers)
    assert reader.division == expected


def test_streams_are_divided_by_their_number(tmp_path):
    tars = [write(tmp_path / f"{i}.tar", [(str(i), {"txt": b"x"})]) for i in range(4)]
    streams = [f"pipe:cat {tar}" for tar in tars]
    for options, expected in (
        ({"workers": 4}, PROCESSES),
        ({"workers": 5}, RANKS),
        ({"workers": 3, "world_size": 2}, RANKS),
        ({"workers": 3, "world_size": 5}, SAMPLES),
    ):
        assert loader(streams, batch_size=64, **options).division == expected


def test_of_many_samples_and_tars_few_are_counted(tmp_path, monkeypatch):
    counted, count = Counter(), divide_samples.count_samples

    def recorded(path, limit):
        counted.update(tars=1, samples=limit)
        return count(path, limit)

    monkeypatch.setattr(divide_samples, "count_samples", recorded)
    tar = write(tmp_path / "a.tar", [(f"k{i}", {"png": PICTURE}) for i in range(2000)])
    shards = [tar] * 150
    assert loader(shards, batch_size=5000, workers=50).division == PROCESSES
    assert counted == {"tars": 1, "samples": 1000}
    assert loader(shards, batch_size=7000, workers=50).division == RANKS
    counted.clear()
    write(tar, [("k", {"png": PICTURE})])
    assert loader(shards, workers=4).division == PROCESSES
    assert counted["tars"] == 100


def pixels(image):
    return torch.rand(3, 1, 1)


def in_turn(items, workers, pin_memory=False):
    """Yields what `from_workers` would, without processes; each has the loader as it is now."""
    count = max(1, workers)
    reader = copy.copy(items.__self__)
    processes = [reader.items(process, count) for process in range(count)]
    for process in itertools.cycle(processes):
        yield next(process)


@dataclass
class Layout:
    """A case: the shards with their weights, the options of the loaders, and what they find."""

    shards: list[dict]
    options: dict
    ranks: int
    weights: dict[str, float]  # by key, of the samples that train
    broken: set[str]
    finds: Counter = field(default_factory=Counter)

    def reader(self, rank, state=None, **options):
        options = self.options | options
        return loader(self.shards, state, rank=rank, world_size=self.ranks, **options)


def case(number, folder):
    rng = random.Random(f"layout/{number}")
    share = rng.choice((0.0, 0.0, 0.1, 0.5))
    damaged = rng.choice((0.0, 0.0, 0.05, 0.6))
    total = int(2000 ** rng.random())
    cuts = rng.choices(range(total + 1), k=rng.randrange(rng.choice((1, 4, 12))))
    shards, weights, broken = [], {}, set()
    for shard, (start, stop) in enumerate(itertools.pairwise([0, *sorted(cuts), total])):
        weight = rng.choice((1, 1, 1, 1, 2, 0.5))
        samples = []
        for key in (f"k{i}" for i in range(start, stop)):
            files = {"png": PICTURE, "txt": key.encode()}
            if rng.random() < damaged:
                files["png"] = BROKEN
                broken.add(key)
            samples.append((key, files))
            if not is_held_out({"__shard__": f"{shard}.tar", "__key__": key, **files}, share):
                weights[key] = weight
        path = write(folder / f"{shard}.tar", samples)
        shards.append({"shards": path, "weight": weight})
    ranks, batches = rng.randrange(1, 4), rng.choice((1, 1, 2, 5))
    most = len(weights) // (ranks * batches) if rng.random() < 0.9 else 512
    options = {
        "workers": rng.randrange(9),
        "batch_size": int(min(512, max(1, most)) ** rng.random()),
        "batches_per_step": batches,
        "hold_out": share,
        "shuffle": rng.random() < 0.8,
        "shuffle_buffer": rng.choice((1, 30, 4096)),
        "seed": number,
        "transform": pixels,
    }
    return Layout(shards, options, ranks, weights, broken)


@dataclass
class Reading:
    """What a rank's loader yields: batches, and the epoch of each row."""

    rank: int
    reader: data.Loader
    batches: list[dict] = field(default_factory=list)
    epochs: list[list[int]] = field(default_factory=list)
    states: list[dict] = field(default_factory=list)

    def steps(self, size):
        """Returns (keys, groups, epochs) of each whole step, a key for a row."""
        for first in range(0, len(self.batches) - size + 1, size):
            batches = self.batches[first : first + size]
            groups = torch.cat([batch["group"] for batch in batches]).tolist()
            yield keys(batches), groups, sum(self.epochs[first : first + size], [])


def read(layout, rank, monkeypatch):
    """Reads a rank's data to the end of EPOCHS epochs in every worker, and a whole step."""
    reading = Reading(rank, layout.reader(rank))
    blocks = []

    def recorded(loader, received=loaders.Loader._blocks):
        for block in received(loader):
            blocks.extend(place.epoch for place in block.places)
            yield block

    step = layout.options["batches_per_step"]
    with monkeypatch.context() as patch:
        patch.setattr(loaders.Loader, "_blocks", recorded)
        for batch in reading.reader:
            size = len(batch["key"])
            reading.batches.append(batch)
            reading.epochs.append(blocks[:size])
            del blocks[:size]
            reading.states.append(json.loads(json.dumps(reading.reader.state_dict())))
            done = min(reading.reader.positions).epoch >= EPOCHS
            if done and len(reading.batches) % step == 0:
                return reading


def check_steps(layout, reading):
    """A step within an epoch has each sample once, and rows of one sample have one group."""
    for names, groups, epochs in reading.steps(layout.options["batches_per_step"]):
        assert len({*zip(names, groups)}) == len({*names}) == len({*groups})
        layout.finds["steps"] += 1
        if len({*epochs}) == 1:
            layout.finds["within an epoch"] += 1
            for name, count in Counter(names).items():
                assert count <= math.ceil(layout.weights[name]), name


def check_epochs(layout, readings):
    """In each epoch of all ranks a sample comes as often as its weight says."""
    counts = [Counter() for _ in range(EPOCHS)]
    for reading in readings:
        rows = zip(keys(reading.batches), itertools.chain(*reading.epochs))
        for key, epoch in rows:
            if epoch < EPOCHS:
                counts[epoch][key] += 1
    for found in counts:
        for key, weight in layout.weights.items():
            expected = {int(weight), math.ceil(weight)} if key not in layout.broken else {0}
            assert found[key] in expected, key
        assert found.keys() <= layout.weights.keys()


def check_resumed(layout, reading, rng):
    """Another loader goes on from any batch with the same ones."""
    cut = rng.randrange(len(reading.batches))
    rest = reading.batches[cut + 1 :][: 4 * layout.options["workers"] + 4]
    again = take(layout.reader(reading.rank, reading.states[cut]), len(rest))
    assert bits(again) == bits(rest)
    layout.finds["resumed"] += 1


def check(layout, monkeypatch, number):
    step = layout.options["batch_size"] * layout.options["batches_per_step"]
    longest = sum(map(math.ceil, layout.weights.values()))
    if 0 < longest < layout.ranks * step:
        with pytest.raises(InputError, match=f"data.batch_size: expected at most {longest:,}, "):
            layout.reader(0)
        layout.finds["too large a step"] += 1
        return
    try:
        readings = [read(layout, rank, monkeypatch) for rank in range(layout.ranks)]
    except data.EmptyDataError:
        assert layout.broken or not longest or min(layout.weights.values()) < 1
        layout.finds["without usable samples"] += 1
        return
    for reading in readings:
        check_steps(layout, reading)
        check_resumed(layout, reading, random.Random(number))
    check_epochs(layout, readings)
    first = readings[0]
    layout.finds[first.reader.division] += 1
    if layout.ranks == 1 and first.reader._streams().shared:
        expected = take(layout.reader(0, workers=0), len(first.batches))
        assert bits(first.batches) == bits(expected), "the number of workers changes nothing"
        layout.finds["as without workers"] += 1


@pytest.mark.slow
def test_random_layouts(tmp_path, monkeypatch, layouts):
    monkeypatch.setattr(loaders, "from_workers", in_turn)
    finds = Counter()
    for number in layouts:
        folder = tmp_path / str(number)
        folder.mkdir()
        layout = case(number, folder)
        try:
            check(layout, monkeypatch, number)
        except Exception as error:
            error.add_note(f"case {number}: {layout.options}, {layout.ranks} ranks")
            raise
        finds += layout.finds
    print(dict(finds))
    assert finds["within an epoch"] > 0
