"""ViT-B-32's text tower on padded captions, and on the same captions cropped in groups by length.

    OMP_NUM_THREADS=1 pytest benchmarks/test_texts.py --repeats 9 --write

Forward and backward of 12 layers of width 512 on 64 captions of at most 77 tokens. The lengths
follow two histograms: one like COCO's captions (mean 13), one like CC12M's alt texts (mean 23, a
tail to 77).
"""

import open_clip
import pytest
import torch

from benchmarks.measure import PASSES, compare, peak_mib
from simplclip.models.crop import TextCrop

TEXTS = 64
CONTEXT = 77
END = 49407
# Tokens, start and end included, and how many of 1,000 captions have so many.
HISTOGRAMS = {
    "COCO": (
        "9:20 10:90 11:180 12:200 13:175 14:120 15:80 16:50 17:30 18:20 20:15 22:10 26:6 32:4"
    ),
    "CC12M": (
        "6:10 8:40 10:85 12:110 14:110 16:100 18:85 20:70 23:75 26:60 30:55 35:60 41:50 48:35 "
        "56:15 64:10 70:5 77:25"
    ),
}
CROPS = {"padded": None, "four groups": 4}


def captions(kind: str) -> torch.Tensor:
    """Returns token ids [TEXTS, CONTEXT], with the quantiles of a histogram as lengths."""
    lengths = list[int]()
    for pair in HISTOGRAMS[kind].split():
        length, count = map(int, pair.split(":"))
        lengths += [length] * count
    chosen = torch.tensor(lengths)[torch.linspace(0, len(lengths) - 1, TEXTS).round().long()]
    text = torch.zeros(TEXTS, CONTEXT, dtype=torch.long)
    for row, length in zip(text, chosen[torch.randperm(TEXTS)].tolist()):
        row[:length] = torch.randint(1, END - 1, (length,))
        row[length - 1] = END
    return text


def measure(kind: str, dtype: str, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    text, model = captions(kind), open_clip.create_model("ViT-B-32")

    def run(groups: int | None) -> None:
        crop = TextCrop(model, groups=groups) if groups else None
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            features = model.encode_text(text, normalize=True)
        features.float().square().mul(torch.arange(features.shape[1])).sum().backward()
        if crop:
            crop.undo()

    cases = {name: lambda groups=groups: run(groups) for name, groups in CROPS.items()}
    shape = f"{kind}: {TEXTS} captions of {(text != 0).sum().item() / TEXTS:.1f} tokens"
    what = {"op": "texts", "shape": shape, "dtype": dtype, "pass": PASSES[True]}
    rows = compare(what, cases, repeats, base="four groups")
    return [row | {"extra_mib": round(peak_mib(cases[row["form"]]), 1)} for row in rows]


@pytest.mark.parametrize("kind", HISTOGRAMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_tower(measured, dtype, kind):
    measured(measure, kind, dtype)
