"""Training steps: siclip-tiny beside plain torch, siclip-s0 beside MobileCLIP-S0; and inference of
the SiCLIPs' towers.

    OMP_NUM_THREADS=1 pytest benchmarks/test_steps.py --repeats 5 --write

Random weights, random pairs in memory, no loader. For inference all models are folded, their image
towers in channels_last.
"""

import pytest
import torch

import simplclip
from benchmarks import training_forms
from benchmarks.measure import compare
from benchmarks.steps import ORIGINALS, beside_original
from simplclip import models

DTYPES = ("float32", "bfloat16")
TEXTS, IMAGES = 64, 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_siclip_tiny(measured, dtype):
    measured(training_forms.measure, 1024, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_siclip_s0(measured, dtype):
    measured(beside_original, "siclip-s0", 16, dtype, torch.device("cpu"))


@pytest.mark.parametrize("student", ORIGINALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(measured, dtype, student):
    measured(inference, dtype, student)


def inference(dtype: str, student: str, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    text = torch.randint(1, 49000, (TEXTS, 77))
    image = torch.rand(IMAGES, 3, 256, 256, dtype=getattr(torch, dtype))

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.encode_text(text)
            model.encode_image(image)

    cases = {}
    for name in (student, ORIGINALS[student]):
        model = simplclip.fold(models.create(name).eval().to(image.dtype))
        model.visual.to(memory_format=torch.channels_last)
        cases[name] = lambda model=model: run(model)
    shape = f"both: {TEXTS} texts, {IMAGES} images"
    what = {"op": "towers", "shape": shape, "dtype": dtype, "pass": "inference"}
    return compare(what, cases, repeats, base=student)
