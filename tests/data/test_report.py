"""The report on shards: its figures are those of the files, with and without indices."""

import json

import pytest
from pairs import call, one_line, write
from photos import encode, photo
from PIL import Image

from simplclip.data import build_index, report, shards, tar


@pytest.fixture
def folder(tmp_path):
    """Writes two shards of photographs, some of them broken; one key occurs twice in a shard, another in both shards."""
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
    return tmp_path


def run(folder, **options):
    return report.run(str(folder / "*.tar"), **{"workers": 1, "sample": 0, "progress": False, "size": 32} | options)


def test_figures_with_indices_and_without(folder, monkeypatch):
    (folder / "00002.tar").write_bytes(b"no tar" * 999)
    found = run(folder, batch_size=10)
    assert (found["files"], found["samples"], found["indexed"], found["decoded"]) == (3, 22 + 25, 0, 0)
    assert "cannot be opened" in found["unreadable"][str(folder / "00002.tar")]
    assert found["bytes"] == sum((folder / f"0000{i}.tar").stat().st_size for i in range(2))
    assert found["formats"] == {"jpeg": 2 * 15 + 1 + 3, "png": 2 * 5 + 2}
    assert found["broken"] == {"missing image": [1, "00001.tar/other"]}
    assert found["quantiles"]["short side"] == {"least": 40, "5 %": 40, "median": 50, "95 %": 70, "most": 70}
    assert found["quantiles"]["captions an image"]["most"] == 2
    assert found["quantiles"]["caption"]["most"] == len("a picture of something that is not there!")
    assert found["epoch"] == {"batch_size": 10, "batches": 4}
    assert found["duplicate_keys"] == {"in_a_file": 1, "in_all": 2}
    assert found["decoding"] is None
    assert not [*folder.glob("*.npz"), *folder.glob("*.png")]
    (folder / "00002.tar").unlink()
    found = run(folder)
    build_index.run(str(folder / "*.tar"), workers=1, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(tar, "members", None)
        patched.setattr(shards, "contents", None)
        assert run(folder, workers=2) == found | {"indexed": 2}
    build_index.run(str(folder / "*.tar"), workers=1, progress=False, decoded=True)
    found = run(folder)
    assert found["decoded"] == found["samples"]
    assert found["broken"]["truncated image"][0] == 2


def test_decoding_is_measured_on_a_spread_sample(folder):
    measured = run(folder, sample=24)["decoding"]
    assert measured["images"] + sum(count for count, _ in measured["broken"].values()) == 24
    assert measured["images_per_second"] > 0
    every = run(folder, sample=1000)["decoding"]
    assert every["images"] == 47 - 3
    assert {reason: count for reason, (count, _) in every["broken"].items()} == {"truncated image": 2, "missing image": 1}


def test_the_command(folder):
    out = folder / "report"
    result = call("data", "report", folder / "*.tar", "--out", out, "--sample", "10", "--size", "32", "--workers", "1")
    assert result.exit_code == 0, result.output
    for words in ("47 in 2 files", "34 jpeg, 12 png", "images/s on one core", "missing image", "1 within a file, 2 in all"):
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
    assert names == ["index", "pack", "report", "shrink", "emoji"]
