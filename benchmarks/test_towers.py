"""Inference of siclip2-s0 against MobileCLIP2-S0, which it was made from: text tower, image tower, both.

    pytest benchmarks/test_towers.py --repeats 9 --write

Random weights. Models take turns within a round.
"""

import pytest
import torch

from benchmarks.measure import figures, interleaved_times
from simplclip import models

NAMES = {"simplclip": "siclip2-s0", "open_clip": "open_clip:MobileCLIP2-S0"}
TEXTS, IMAGES = 64, 8


def run(model, text, image):
    with torch.no_grad():
        if text is not None:
            model.encode_text(text)
        if image is not None:
            model.encode_image(image)


@pytest.mark.parametrize("tower", ["text", "image", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference(benchmark, rows, request, dtype, tower):
    torch.manual_seed(0)
    towers = {key: models.create(name).eval().to(getattr(torch, dtype)) for key, name in NAMES.items()}
    text = torch.randint(1, 49000, (TEXTS, 77)) if tower != "image" else None
    image = torch.rand(IMAGES, 3, 256, 256, dtype=getattr(torch, dtype)) if tower != "text" else None
    cases = {key: lambda model=model: run(model, text, image) for key, model in towers.items()}
    repeats = request.config.getoption("--repeats")
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats, 2), rounds=1)
    counts = f"{TEXTS} texts" * (text is not None) + ", " * (tower == "both") + f"{IMAGES} images" * (image is not None)
    rows += [
        {
            "op": "towers",
            "shape": f"{tower}: {counts}",
            "dtype": dtype,
            "pass": "inference",
            "form": NAMES[key],
            "repeats": repeats,
            **figures(times, key),
        }
        for key in cases
    ]
