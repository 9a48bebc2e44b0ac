"""docs/your-photos.md: its blocks run in order on generated pictures, with fewer steps of smaller batches."""

import contextlib
import functools
import json
import os
import re
import shlex
import traceback
from pathlib import Path

import example
import numpy as np
import pytest
import tiny
from pairs import forked
from paths import ROOT

from simplclip.commands.main import main

PAGE = ROOT / "docs" / "your-photos.md"
SMALLER = {"steps: 200": "steps: 2", "every: 50": "every: 2", "batch_size: 128": "batch_size: 8, workers: 0"}


def blocks() -> list[tuple[str, str]]:
    """Returns the language and text of each block; the last section is for a GPU and downloads weights."""
    text = PAGE.read_text().split("\n## With a GPU")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def command(line: str) -> None:
    """Runs a line of a shell block in a fork of this process, which has the modules."""
    program, *words = shlex.split(line)
    assert program in ("simplclip", "python"), line

    def run() -> None:
        with open("printed", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                if program == "python":
                    example.load(words[0].removeprefix("examples/").removesuffix(".py")).main(words[1:])
                else:
                    assert not main(words, standalone_mode=False)
            except BaseException:
                traceback.print_exc()
                raise

    assert forked(run) == 0, f"{line}: {Path('printed').read_text()[-3000:]}"


@pytest.mark.slow
def test_every_block_runs(tmp_path, monkeypatch, request):
    """The export for ONNX, which takes longest, runs with --prove; another one: test_export_onnx.py."""
    monkeypatch.chdir(tmp_path)
    onnx = ["onnx/image.onnx"] if request.config.getoption("--prove") else []
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    for name, colour in tiny.COLOURS.items():
        for shape in tiny.SHAPES:
            place = tmp_path / "photos" / ("trip" if shape == "ring" else "") / f"{name}-{shape}"
            place.with_suffix(".png").write_bytes(tiny.picture(colour, shape, size=64))
            place.with_suffix(".txt").write_text(f"a {name} {shape}\n")
    for language, text in blocks():
        if language == "yaml":
            text = functools.reduce(lambda text, change: text.replace(*change), SMALLER.items(), text)
            assert "steps: 2}" in text
            (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        else:
            for line in text.replace("\\\n", " ").splitlines():
                if onnx or "export_onnx.py" not in line:
                    command(line)
    assert len(list((tmp_path / "held").iterdir())) == 6
    figures = json.loads((tmp_path / "runs" / "photos" / "evaluation.json").read_text())
    assert figures["splits"]["held"]["images"] == 3
    assert len(np.load(tmp_path / "photos.npz")["features"]) == 21
    for made in ("hits.png", "export/open_clip_model.safetensors", "runs/photos/evaluation-held.png", *onnx):
        assert os.path.getsize(made), made
