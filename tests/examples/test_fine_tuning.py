"""docs/fine-tuning.md: its blocks run in order on generated pictures, with a tiny model's random
weights in place of the download, in fewer steps of smaller batches.

What the commands import is imported here, so that the forks have it.
"""

import itertools
import json
import re
from pathlib import Path

import open_clip
import pytest
import torch

import simplclip.evaluation.run
import simplclip.export
import simplclip.train.loop
import simplclip.train.setup
from support.models.open_clip_models import write_models
from support.paths import ROOT
from support.programs import run_line
from support.train import tiny

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text("utf-8")
REPLACED = {
    "checkpoint: ViT-B-32/laion2b_s34b_b79k": "checkpoint: tiny.bin",
    "ViT-B-32/laion2b_s34b_b79k": "tiny/tiny.bin",
    "open_clip:ViT-B-32": "open_clip:tiny",
    "batch_size: 256": "batch_size: 8, workers: 0",
    "warmup: 20": "warmup: 1",
    "hold_out: 0.1, every: 50": "hold_out: 0.2",
    "steps: 200": "steps: 1",
}


def blocks() -> list[tuple[str, str]]:
    """Returns the language and the text of each block, for the tiny model."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    texts = []
    for language, text in found:
        for larger, smaller in REPLACED.items():
            text = text.replace(larger, smaller)
        texts.append((language, text))
    return texts


def test_every_replacement_is_needed():
    for larger in REPLACED:
        assert larger in PAGE, larger


@pytest.mark.slow
def test_every_block_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    Path("photos").mkdir()
    for name, shape in itertools.product(tiny.COLOURS, tiny.SHAPES):
        place = Path("photos", f"{name}-{shape}")
        place.with_suffix(".png").write_bytes(tiny.picture(tiny.COLOURS[name], shape))
        place.with_suffix(".txt").write_text(f"a {name} {shape}\n")
    printed = {}
    for language, text in blocks():
        if language == "yaml":
            Path(text.partition("\n")[0].removeprefix("# ")).write_text(text)
            continue
        assert language == "sh"
        for line in text.splitlines():
            printed[line] = run_line(line)

    (both,) = (
        text
        for line, text in printed.items()
        if line.startswith("simplclip evaluate runs/full open")
    )
    assert "held_out" in both
    blend = json.loads(Path("runs/full/blend.json").read_text())
    assert [row["alpha"] for row in blend["rows"]] == [number / 10 for number in range(11)]
    # full training moves both towers, lr_scale the image tower alone, LoRA less than a third
    start = torch.load("tiny.bin")
    sizes = {}
    for run in ("full", "decay", "image"):
        state = simplclip.load(f"runs/{run}").model.state_dict()
        changed = {name for name in start if not state[name].equal(start[name])}
        sizes[run] = len(changed)
        if run == "image":
            assert changed
            assert all(name.startswith("visual.") for name in changed)
    assert sizes["full"] == sizes["decay"] > sizes["image"]
    assert Path("runs/lora/last.pt").stat().st_size < Path("runs/lora/base.pt").stat().st_size
    # the export is the middle
    exported = open_clip.create_model("local-dir:export").state_dict()
    end = simplclip.load("runs/full").model.state_dict()
    name = "visual.conv1.weight"
    middle = (start[name] + end[name]) / 2
    torch.testing.assert_close(exported[name], middle)
    assert Path("hits.png").stat().st_size
