"""The scripts of examples/ are short, and distil.py lowers its loss on a tiny model."""

import itertools
import re
from pathlib import Path

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
    assert len(scripts) == 4
    assert max(len(path.read_text().splitlines()) for path in scripts) <= 180


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
