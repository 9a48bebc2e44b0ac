"""Inference of siclip-s0 and siclip2-s0 against the models that they were made from: text tower, image tower, both.

    OMP_NUM_THREADS=1 pytest benchmarks/test_towers.py --repeats 9 --write

Random weights; all models are folded, their image towers in channels_last. Models take turns within a round. The text tower
of MobileCLIP-S0 is measured twice: as published, its last MLP computes all tokens, of which one is used.
"""

import pytest
import torch

import simplclip
from benchmarks.measure import clock_of_steps, figures, interleaved_times
from simplclip import models

PAIRS = {"siclip-s0": "mobileclip-s0", "siclip2-s0": "open_clip:MobileCLIP2-S0"}
TEXTS, IMAGES = 64, 8


def every_token(model, text):
    tokens = model.text.encode_tokens(text)
    return tokens[torch.arange(len(text)), text.argmax(1)] @ model.text.text_projection


def cases_of(student, original, towers, text, image):
    def run(model, encode_text):
        with torch.no_grad():
            if "text" in towers:
                encode_text(text)
            if "image" in towers:
                model.encode_image(image)

    loaded = {name: simplclip.fold(models.create(name).eval().to(image.dtype)) for name in (student, original)}
    for model in loaded.values():
        model.visual.to(memory_format=torch.channels_last)
    cases = {name: lambda model=model: run(model, model.encode_text) for name, model in loaded.items()}
    if original == "mobileclip-s0" and "text" in towers:
        model = loaded[original]
        cases[f"{original}, as published"] = lambda: run(model, lambda text: every_token(model, text))
    return cases


@pytest.mark.parametrize("student", PAIRS)
@pytest.mark.parametrize("tower", ["text", "image", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference(benchmark, rows, request, dtype, tower, student):
    torch.manual_seed(0)
    towers = ("text", "image") if tower == "both" else (tower,)
    text, image = torch.randint(1, 49000, (TEXTS, 77)), torch.rand(IMAGES, 3, 256, 256, dtype=getattr(torch, dtype))
    cases = cases_of(student, PAIRS[student], towers, text, image)
    repeats = request.config.getoption("--repeats")
    name, clock = clock_of_steps()
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats, 1, clock), rounds=1)
    counts = ", ".join(f"{count} {what}s" for what, count in (("text", TEXTS), ("image", IMAGES)) if what in towers)
    how = {"threads": torch.get_num_threads(), "clock": name, "repeats": repeats}
    row = {"op": "towers", "shape": f"{tower}: {counts}", "dtype": dtype, "pass": "inference"}
    rows += [row | {"form": form} | how | figures(times, form, base=student) for form in cases]
