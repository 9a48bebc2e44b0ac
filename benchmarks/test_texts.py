"""A text tower on padded captions, and on the same ones cropped in one piece and in groups by length.

    OMP_NUM_THREADS=1 pytest benchmarks/test_texts.py --repeats 9 --write

Forward and backward of the text tower of ViT-B-32 (12 layers, width 512, causal, 77 tokens) on 64 captions. Their lengths
are those of two histograms, of the kinds of COCO's captions (mean 13) and of CC12M's alt texts (mean 23, a tail to 77).
"""

import open_clip
import pytest
import torch

import simplclip
from benchmarks.measure import clock_of_steps, figures, interleaved_times, peak_bytes
from simplclip.models.crop import TextCrop

TEXTS = 64
# Captions of 1,000 by their tokens, with start and end.
HISTOGRAMS = {
    "COCO": {9: 20, 10: 90, 11: 180, 12: 200, 13: 175, 14: 120, 15: 80, 16: 50, 17: 30, 18: 20, 20: 15, 22: 10, 26: 6, 32: 4},
    "CC12M": {
        6: 10, 8: 40, 10: 85, 12: 110, 14: 110, 16: 100, 18: 85, 20: 70, 23: 75, 26: 60, 30: 55, 35: 60, 41: 50, 48: 35,
        56: 15, 64: 10, 70: 5, 77: 25,
    },
}  # fmt: skip


def captions(kind, context=77, end=49407):
    """Token ids [TEXTS, context]: the quantiles of a histogram, in random order."""
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


@pytest.mark.parametrize("kind", HISTOGRAMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_tower(benchmark, rows, request, dtype, kind):
    torch.manual_seed(0)
    text = captions(kind)
    model = open_clip.create_model("ViT-B-32")

    simplclip.crop_texts(model).undo()  # tries whether it can

    def run(groups):
        crop = TextCrop(model, groups=groups) if groups else None
        step(model, text, dtype)
        if crop:
            crop.undo()

    crops = {"padded": None, "one piece": 1, "four groups": 4}
    cases = {name: lambda groups=groups: run(groups) for name, groups in crops.items()}
    repeats = request.config.getoption("--repeats")
    name, clock = clock_of_steps()
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats, 1, clock), rounds=1)
    mean = (text != 0).sum().item() / TEXTS
    how = {"threads": torch.get_num_threads(), "clock": name, "repeats": repeats}
    row = {
        "op": "texts",
        "shape": f"{kind}: {TEXTS} captions of {mean:.1f} tokens",
        "dtype": dtype,
        "pass": "forward + backward",
    }
    rows += [row | {"form": form} | how | figures(times, form, base="four groups") for form in cases]
    peaks = {name: peak_bytes(case, "cpu") for name, case in cases.items()}
    for one in rows[-len(cases) :]:
        one["extra_mib"] = round(peaks[one["form"]] / 2**20, 1)
