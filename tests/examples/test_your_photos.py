"""docs/your-photos.md as a notebook: its cells run in order on generated pictures, with fewer steps
of smaller batches.
"""

import io
import itertools
import json
import os
import runpy
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from simplclip.ops import backends
from support.paths import ROOT
from support.programs import run_line
from support.train import tiny

NOTEBOOK = ROOT / "examples" / "first_day.ipynb"
SMALLER = {
    "steps: 200": "steps: 2",
    "every: 25": "every: 2",
    "batch_size: 128": "batch_size: 8, workers: 0",
}


def test_the_notebook_is_that_of_the_page():
    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))
    assert made["notebook"](
        (ROOT / "docs" / "your-photos.md").read_text("utf-8")
    ) == NOTEBOOK.read_text("utf-8"), "python docs/make_notebook.py makes it anew"


def test_a_t4_has_the_backends_that_the_notebook_names(monkeypatch):
    monkeypatch.setattr(backends, "capability", lambda device: (7, 5))
    t4, facts = torch.device("cuda", 0), backends.Facts(length=16, width=32)
    chosen = {op: backends.select(op, t4, torch.float32, facts=facts) for op in backends.TABLE}
    attention = {op: name for op, name in chosen.items() if "attention" in op}
    assert {*attention.values()} == {"sdpa"}
    assert {chosen[op] for op in chosen.keys() - attention.keys()} == {"reference"}
    text = NOTEBOOK.read_text("utf-8")
    assert "by the backend `reference`, and attention by torch's own kernels" in text


def cells() -> list[str]:
    """Returns the code of the notebook, without the cells that install or fetch something."""
    every = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    made = [cell for cell in every if cell["cell_type"] == "code"]
    kept = [cell for cell in made if "setup" not in cell["metadata"].get("tags", ())]
    assert len(made) == len(kept) + 2
    return ["".join(cell["source"]) for cell in kept]


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, request):
    """The pictures stay. The export for ONNX runs with --prove; see test_export_onnx.py."""
    monkeypatch.chdir(tmp_path)
    shown = []
    screen = types.SimpleNamespace(
        Image=lambda path: Path(path).read_bytes()[:4], display=shown.append
    )
    onnx = []
    if request.config.getoption("--prove"):
        onnx = ["onnx/image.onnx", "onnx/preprocessing.json"]
    for year, (name, colour), (number, shape) in itertools.product(
        ("2019", "2020"), tiny.COLOURS.items(), enumerate(tiny.SHAPES)
    ):
        place = tmp_path / "photos" / year / name / f"IMG_{number:04}"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(tiny.picture(colour, shape, size=64)))
        if shape == "ring":
            image.putalpha(image.convert("L").point(lambda value: 255 * (value < 250)))
        image.save(place.with_suffix(".png"))
        place.with_suffix(".txt").write_text(f"a {name} {shape} of {year}\n")
    (tmp_path / "photos/2019/broken.png").write_bytes(
        (tmp_path / "photos/2019/red/IMG_0000.png").read_bytes()[:40]
    )
    (tmp_path / "photos/2019/broken.txt").write_text("a broken picture\n")
    # between the parts of its content is another one: it opens, but its decoder raises SyntaxError
    damaged = tmp_path / "photos/2019/damaged.png"
    Image.effect_noise((400, 400), 80).save(damaged)
    head, first, *rest = damaged.read_bytes().split(b"IDAT")
    first = first[:-4] + b"\0\0\0\4\1\1\1\1DATASUMS" + first[-4:]
    damaged.write_bytes(b"IDAT".join([head, first, *rest]))
    damaged.with_suffix(".txt").write_text("a damaged picture\n")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 32), "blue").save(tmp_path / "photos/2019/turned.jpg", exif=exif)
    (tmp_path / "photos/2019/turned.txt").write_text("a blue wall\n")
    before = contents(tmp_path / "photos")
    for text in cells():
        if text.startswith("%%writefile "):
            for larger, smaller in SMALLER.items():
                text = text.replace(larger, smaller)
            assert "steps: 2}" in text
            first, _, rest = text.partition("\n")
            (tmp_path / first.removeprefix("%%writefile ")).write_text(rest)
        elif text.startswith("!"):
            for line in text.splitlines():
                if onnx or "export_onnx.py" not in line:
                    run_line(line.removeprefix("!"))
                if line.startswith("!simplclip train"):
                    printed = Path("printed").read_text()
                    assert "1 skipped: 1 not an image (first: photos/2019/broken" in printed
                    assert "8 with transparency, which the model does not see" in printed
        else:
            modules = {"IPython": types.SimpleNamespace(), "IPython.display": screen}
            with mock.patch.dict(sys.modules, modules):
                exec(compile(text, "cell", "exec"), {})
    assert contents(tmp_path / "photos") == before
    assert shown == [b"\x89PNG"] * 3
    assert Image.open(tmp_path / "on_white/2019/turned.jpg").size == (32, 64)
    white = Image.open(tmp_path / "on_white/2019/red/IMG_0004.png")
    assert (white.mode, white.getextrema()[1]) == ("RGB", (30, 255))
    figures = json.loads((tmp_path / "runs" / "photos" / "evaluation.json").read_text())
    assert figures["checkpoint"] == "runs/photos/best.pt"
    assert 1 <= figures["splits"]["held_out"]["images"] <= 12
    assert len(np.load(tmp_path / "photos.npz")["features"]) == 49
    for made in ("hits.png", "export/open_clip_model.safetensors", "export/README.md", *onnx):
        assert os.path.getsize(made), made
    card = (tmp_path / "export" / "README.md").read_text("utf-8")
    for words in (
        "- held_out, image to text R@1: ",
        "- Started from: efficientnet-lite0, minilm\n",
        "loss:\n",
    ):
        assert words in card, words


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
