"""How samples are divided among ranks and loader processes."""

import json
from collections import Counter

import pytest

from simplclip.data import divide_samples
from support.data.pairs import loader, png, write

PROCESSES, RANKS, SAMPLES = "processes", "ranks", "samples"
PICTURE = png(size=(1, 1))


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
