"""A text tower on padded captions and on the same captions cropped, in one piece or in groups by length; and the demo's step.

    OMP_NUM_THREADS=1 pytest benchmarks/test_texts.py --repeats 9 --write

Forward and backward of text towers on 64 captions: ViT-B-32's (12 layers, width 512, causal, 77 tokens), and those of
siclip2-s0 and siclip-s0 with masked padding. The lengths of the captions follow two histograms: one like COCO's captions
(mean 13), one like CC12M's alt texts (mean 23, a tail to 77). The demo's step needs the demo's data, see its config.
"""

from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks.measure import PASSES, compare, peak_mib
from simplclip import models
from simplclip.models.crop import TextCrop
from simplclip.models.inherit import freeze_norms
from simplclip.train import config
from simplclip.train.loop import make_loader
from simplclip.train.setup import setup
from simplclip.train.step import train_step

TEXTS = 64
# How many of 1,000 captions have so many tokens, start and end included.
HISTOGRAMS = {
    "COCO": {9: 20, 10: 90, 11: 180, 12: 200, 13: 175, 14: 120, 15: 80, 16: 50, 17: 30, 18: 20, 20: 15, 22: 10, 26: 6, 32: 4},
    "CC12M": {
        6: 10, 8: 40, 10: 85, 12: 110, 14: 110, 16: 100, 18: 85, 20: 70, 23: 75, 26: 60, 30: 55, 35: 60, 41: 50, 48: 35,
        56: 15, 64: 10, 70: 5, 77: 25,
    },
}  # fmt: skip


def captions(kind, context=77, end=49407):
    """Returns token ids [TEXTS, context]. Their lengths are the quantiles of a histogram, in random order."""
    lengths = [length for length, count in HISTOGRAMS[kind].items() for _ in range(count)]
    chosen = torch.tensor(lengths)[torch.linspace(0, len(lengths) - 1, TEXTS).round().long()]
    text = torch.zeros(TEXTS, context, dtype=torch.long)
    for row, length in zip(text, chosen[torch.randperm(TEXTS)].tolist()):
        row[:length] = torch.randint(1, end - 1, (length,))
        row[length - 1] = end
    return text


def step(model, text, dtype):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        features = model.encode_text(text, normalize=True)
    features.float().square().mul(torch.arange(features.shape[1])).sum().backward()


def siclip(name):
    model = models.create(name, simplify_options={"mask_padding": True})
    freeze_norms(model)
    return model


TOWERS = {
    "": lambda: open_clip.create_model("ViT-B-32"),
    "siclip2-s0, masked, ": lambda: siclip("siclip2-s0"),
    "siclip-s0, masked, ": lambda: siclip("siclip-s0"),
}
CROPS = {"padded": None, "one piece": 1, "four groups": 4}


def measure(what, run, repeats):
    """Measures run(groups) for each of CROPS, and its peak memory."""
    cases = {name: lambda groups=groups: run(groups) for name, groups in CROPS.items()}
    rows = compare({"op": "texts", **what}, cases, repeats, base="four groups")
    return [row | {"extra_mib": peak_mib(cases[row["form"]])} for row in rows]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", HISTOGRAMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_tower(measured, dtype, kind, tower):
    torch.manual_seed(0)
    text, model = captions(kind), TOWERS[tower]()

    def run(groups):
        crop = TextCrop(model, groups=groups) if groups else None
        step(model, text, dtype)
        if crop:
            crop.undo()

    shape = f"{tower}{kind}: {TEXTS} captions of {(text != 0).sum().item() / TEXTS:.1f} tokens"
    measured(measure, {"shape": shape, "dtype": dtype, "pass": PASSES[True]}, run)


@pytest.mark.skipif(not Path("data/emoji").exists(), reason="needs data/emoji and data/emoji-teacher, as the demo does")
def test_demo_step(measured):
    torch.manual_seed(0)
    state = setup(config.load("examples/emoji/siclip-lite0.yaml", ["data.workers=0"]), torch.device("cpu"), "bf16")
    of_step, crop = [next(iter(make_loader(state)[0]))], state.crop

    def run(groups):
        crop.undo()
        state.crop = TextCrop(state.model, groups=groups) if groups else None
        train_step(state, of_step)

    text = of_step[0]["text"]
    images, captions, length = text.shape
    mean = (text != 0).double().sum(-1).mean().item()
    shape = f"the demo's step: {images} images, {captions} captions each of {mean:.1f} of {length} tokens"
    measured(measure, {"shape": shape, "dtype": "bfloat16", "pass": "step"}, run)
