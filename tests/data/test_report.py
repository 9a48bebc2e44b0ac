"""The report on shards: its figures are those of the files, with indices or without."""

import json
from collections import Counter

import numpy as np
import pytest
from pairs import call, one_line, write
from photos import encode, photo
from PIL import Image

from simplclip.data import indexing, report, shards, tar


@pytest.fixture
def folder(tmp_path):
    """img2dataset's output in small: two shards of photographs, some broken, one key twice in a shard, one in both."""
    words = ["a", "picture", "of", "something", "that", "is", "not", "there"]
    images = [encode(photo(i, (40 + 10 * i, 90)), "PNG" if i == 2 else "JPEG") for i in range(4)]
    for shard in range(2):
        samples = []
        for i in range(20):
            text = " ".join(words[: 1 + i % 8])
            record = {"captions": [text, text + "!"][: 1 + i % 2], "width": 40, "status": "success"}
            files = {"png" if i % 4 == 2 else "jpg": images[i % 4], "json": json.dumps(record).encode(), "txt": text.encode()}
            samples.append((f"{shard:05d}{i:04d}", files))
        samples += [("both", samples[0][1]), ("twice", samples[0][1]), ("other", {"txt": b"x"}), ("twice", samples[0][1])][
            : 4 if shard else 1
        ]
        samples.append((f"cut{shard}", {"png": images[2][:300], "txt": b"x"}))
        write(tmp_path / f"{shard:05d}.tar", samples)
        stats = {"count": 30, "successes": 22 if shard == 0 else 99, "failed_to_download": 8}
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return tmp_path


def run(folder, **options):
    return report.run(str(folder / "*.tar"), **{"workers": 1, "sample": 0, "progress": False, "size": 32} | options)


def test_figures(folder):
    found = run(folder, batch_size=10)
    assert (found["shards"], found["samples"], found["indexed"]) == (2, 22 + 25, 0)
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found["formats"] == {"jpeg": 2 * 15 + 1 + 3, "png": 2 * 5 + 2}
    assert found["broken"] == {"missing image": [1, "00001.tar/other: "[:-2]]}
    assert found["quantiles"]["short side"] == {"least": 40, "5 %": 40, "median": 50, "95 %": 70, "most": 70}
    assert found["quantiles"]["captions an image"]["most"] == 2
    assert found["quantiles"]["caption"]["most"] == len("a picture of something that is not there!")
    assert "tokens" not in found["quantiles"]
    assert found["epoch"] == {"batch_size": 10, "batches": 4}
    assert found["duplicate_keys"] == {"in_a_shard": 1, "in_all_shards": 2, "first": "00000.tar/both"}
    assert found["img2dataset"] == {str(folder / "00001.tar"): [99, 25]}
    assert found["decoding"] is None
    for name in ("short side", "caption", "captions an image", "image file"):
        assert sum(found["histograms"][name]["counts"]) == (46 if name != "caption" else 46 + 20)
    assert not list(folder.glob("*.npz"))
    assert not list(folder.glob("*.png"))


def test_a_report_by_indices_is_the_same_without_reading(folder, monkeypatch):
    plain = run(folder)
    indexing.run(str(folder / "*.tar"), workers=1, progress=False, tokens=True)
    with monkeypatch.context() as patched:
        patched.setattr(tar, "members", None)
        patched.setattr(shards, "contents", None)
        found = run(folder, workers=2)
    assert found["indexed"] == 2
    tokens = found["quantiles"].pop("tokens"), found["histograms"].pop("tokens")
    assert tokens[0]["least"] == 3
    assert sum(tokens[1]["counts"]) == 66
    assert found == plain | {"indexed": 2}
    indexing.run(str(folder / "*.tar"), workers=1, progress=False, decoded=True)
    found = run(folder)
    assert found["decoded"] == found["samples"]
    assert found["broken"]["truncated image"][0] == 2


def test_a_shard_that_cannot_be_read_is_named(folder):
    (folder / "00002.tar").write_bytes(b"no tar" * 999)
    found = run(folder)
    assert (found["shards"], found["samples"]) == (3, 47)
    assert "cannot be opened" in found["unreadable"][str(folder / "00002.tar")]


def test_decoding_is_measured_on_a_spread_sample(folder):
    found = run(folder, sample=24)
    measured = found["decoding"]
    assert measured["images"] + sum(count for count, _ in measured["broken"].values()) == 24
    assert measured["images_per_second"] > 0
    hours = found["samples"] / measured["images_per_second"] / 3600
    assert measured["core_hours_an_epoch"] == pytest.approx(hours, rel=0.01)
    assert measured["hours_an_epoch"] == pytest.approx(hours / measured["cores"], rel=0.01)
    every = run(folder, sample=1000)["decoding"]
    assert every["images"] == 47 - 3
    assert {reason: count for reason, (count, _) in every["broken"].items()} == {"truncated image": 2, "missing image": 1}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_quantiles_are_numpys(share):
    values = np.random.default_rng(0).integers(0, 50, 331)
    want = np.quantile(values, share, method="inverted_cdf")
    assert report.quantile(Counter(values.tolist()), share) == want


@pytest.mark.parametrize("name", ["short side", "image file", "captions an image", "caption"])
@pytest.mark.parametrize(
    "values", [{1: 3}, {512: 5, 513: 1}, {1: 1, 7: 9, 100_000: 1}, {value: value for value in range(1, 700)}]
)
def test_histograms_hold_every_value(name, values):
    found = report.histogram(name, values)
    edges, counts = found["edges"], found["counts"]
    assert sum(counts) == sum(values.values())
    assert len(edges) == len(counts) + 1
    assert edges == sorted(set(edges))
    assert edges[0] <= min(values)
    place = next(i for i in range(len(counts)) if edges[i] <= min(values) < edges[i + 1])
    assert counts[place] >= values[min(values)]


def test_the_command(folder):
    out = folder / "report"
    result = call("data", "report", folder / "*.tar", "--out", out, "--sample", "10", "--size", "32", "--workers", "1")
    assert result.exit_code == 0, result.output
    for words in ("47 in 2 shards", "34 jpeg, 12 png", "images/s on one core", "missing image", "1 within a shard, 2 in all"):
        assert words in result.stdout
    assert json.loads((out / "report.json").read_text())["samples"] == 47
    with Image.open(out / "report.png") as picture:
        assert picture.width >= 1000
    assert "expected files" in one_line("data", "report", folder / "none-*.tar")


def test_shards_without_a_usable_sample(tmp_path):
    write(tmp_path / "a.tar", [("a", {"txt": b"x"})])
    found = run(tmp_path, sample=5, out=tmp_path / "report")
    assert (found["samples"], found["images"]) == (1, 0)
    assert (tmp_path / "report" / "report.png").is_file()
    result = call("data", "report", tmp_path / "a.tar", "--workers", "1")
    assert result.exit_code == 0, result.output


def test_emoji_is_still_a_command():
    result = call("data", "--help")
    names = [line.split()[1] for line in result.stdout.splitlines() if line[:1] == "│" and line[2:3].isalpha()]
    assert names == ["index", "report", "shrink", "emoji"]
