"""The scripts of examples/ that train: each lowers its loss on a tiny model, and its weights load.

All are short.
"""

import itertools
import re
from pathlib import Path

import open_clip
import pytest

import simplclip
from support.data import pairs
from support.models.open_clip_models import write_models
from support.paths import ROOT
from support.programs import load_example
from support.train import tiny

pytestmark = pytest.mark.long


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """24 pictures with captions in a shard and in a folder, and weights of the model tiny."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    samples = {}
    (tmp_path / "photos").mkdir()
    for colour, shape in itertools.product(tiny.COLOURS, tiny.SHAPES):
        caption = f"a {colour} {shape}\n".encode()
        files = {"png": tiny.picture(tiny.COLOURS[colour], shape), "txt": caption}
        samples[f"{colour}-{shape}"] = files
        for suffix, content in files.items():
            (tmp_path / "photos" / f"{colour}-{shape}.{suffix}").write_bytes(content)
    pairs.write(tmp_path / "pairs.tar", [*samples.items()])


def run(script: str, capsys, *arguments: str) -> list[float]:
    """Runs a script without loader processes; returns the losses that it prints."""
    load_example(script).main([*arguments, "--workers", "0"])
    return [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]


def test_every_script_is_a_page():
    scripts = [*(ROOT / "examples").glob("*.py")]
    assert len(scripts) == 7
    assert max(len(path.read_text().splitlines()) for path in scripts) <= 180


@pytest.mark.slow
def test_drop_in_loss(captioned, capsys):
    sizes = ["--batch-size", "24", "--steps", "61"]
    losses = run("drop_in_loss", capsys, "*.tar", "--model", "tiny", *sizes, "--out", "my.pt")
    assert losses[-1] < 2.5, losses  # ln 24 = 3.18
    assert simplclip.load("open_clip:tiny/my.pt").width == 16
    few = ["--batch-size", "24", "--steps", "1", "--workers", "2"]  # of one shard
    load_example("drop_in_loss").main(["*.tar", "--model", "tiny", *few, "--out", "my.pt"])


@pytest.mark.slow
def test_big_batch_compares_all_pairs(captioned, capsys):
    sizes = ["--batch-size", "24", "--micro-batch", "6", "--steps", "20"]
    losses = run("big_batch", capsys, "*.tar", "--model", "tiny", *sizes, "--out", "big.pt")
    assert losses[-1] < 0.9 * losses[0]
    # of all 24 pairs, ln 24 = 3.18; of 6 pairs it would be at most ln 6 = 1.79
    assert losses[-1] > 2.5
    assert simplclip.load("open_clip:tiny/big.pt").width == 16


def test_what_would_fail_at_the_end_fails_before_the_model_is_made(captioned, monkeypatch, capsys):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", None)
    for script, arguments, message in (
        ("drop_in_loss", ["*.tar"], "no/my.pt"),
        ("drop_in_loss", ["no/*.tar"], "shards: expected files, got none by 'no/*.tar'"),
        ("big_batch", ["*.tar"], "no/my.pt"),
        ("big_batch", ["*.tar", "--batch-size", "100"], "expected a multiple of --micro-batch"),
    ):
        with pytest.raises((SystemExit, FileNotFoundError)) as error:
            run(script, capsys, *arguments, "--model", "tiny", "--out", "no/my.pt")
        assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.slow
def test_distil(captioned, capsys):
    teacher = ["--teacher", "open_clip:tiny/tiny.bin", "--out", "distilled"]
    few = ["--batch-size", "12", "--steps", "1"]
    # of siclip-tiny, as of the default, the text tower has the projection to the embedding
    run("distil", capsys, "*.tar", *teacher, "--student", "siclip-tiny", *few)
    assert Path("distilled/student.pt").exists()
    sizes = ["--batch-size", "12", "--steps", "31"]
    losses = run("distil", capsys, "*.tar", *teacher, "--student", "open_clip:tiny-wide", *sizes)
    first, last = losses[:4], losses[-4:]  # contrastive, relational, interactive, feature
    assert sum(last) < 0.9 * sum(first)
    assert last[3] < first[3]  # nearer to the teacher's features
    assert simplclip.load("open_clip:tiny-wide/distilled/student.pt").width == 24
