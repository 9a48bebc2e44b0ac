"""Training steps: siclip-tiny beside plain torch, siclip-s0 beside MobileCLIP-S0; and inference of the SiCLIPs' towers.

    OMP_NUM_THREADS=1 pytest benchmarks/test_steps.py --repeats 5 --write

Random weights, random pairs in memory, no loader. A step of siclip-s0 is a step of `simplclip train`: unchanged parts are
inherited and frozen, with pair matching and distillation from stored features. A step of MobileCLIP-S0 is open_clip's, with
its contrastive loss and all weights trained. For inference all models are folded, their image towers in channels_last; the
text tower of MobileCLIP-S0 is measured twice: as published, its last MLP computes all tokens, of which one is used.
"""

import pytest
import torch

import simplclip
from benchmarks import training_forms
from benchmarks.measure import compare, peak_mib
from benchmarks.steps import OpenClipStep, runner
from benchmarks.training_forms import PRECISION
from simplclip import models
from simplclip.memory.step import TrainerStep
from simplclip.train import config

DTYPES = ("float32", "bfloat16")
BATCH = 16
PAIRS = {"siclip-s0": "mobileclip-s0", "siclip2-s0": "open_clip:MobileCLIP2-S0"}
TEXTS, IMAGES = 64, 8


@pytest.mark.parametrize("batch", [192, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_siclip_tiny(measured, dtype, batch):
    measured(training_forms.measure, batch, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_siclip_s0(measured, dtype):
    measured(siclip_s0, dtype)


def siclip_s0(dtype, repeats):
    torch.manual_seed(0)
    changes = ["data.micro_batch=null", "data.captions_per_image=1", f"data.batch_size={BATCH}", "loss.pm_weight=1"]
    ours, whole = "siclip-s0, inherited, all of WIKD and pair matching", "mobileclip-s0 whole, ClipLoss"
    steps = {
        ours: TrainerStep(config.load("siclip-s0", changes), PRECISION[dtype], teacher_width=512),
        whole: OpenClipStep("mobileclip-s0", BATCH, PRECISION[dtype]),
    }
    cases = {form: runner(step, torch.device("cpu")) for form, step in steps.items()}
    what = {"op": "siclip_s0_step", "shape": f"{BATCH} pairs", "dtype": dtype, "pass": "step"}
    rows = compare(what, cases, repeats, base=ours)
    for row in rows:
        row["samples_per_s"] = round(1e3 * BATCH / row["p50_ms"], 1)
        row["extra_mib"] = round(peak_mib(cases[row["form"]]))
    return rows


@pytest.mark.parametrize("student", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(measured, dtype, student):
    measured(inference, dtype, student)


def inference(dtype, student, repeats):
    torch.manual_seed(0)
    text, image = torch.randint(1, 49000, (TEXTS, 77)), torch.rand(IMAGES, 3, 256, 256, dtype=getattr(torch, dtype))

    def run(model, encode_text):
        with torch.no_grad():
            encode_text(text)
            model.encode_image(image)

    cases = {}
    for name in (student, PAIRS[student]):
        model = simplclip.fold(models.create(name).eval().to(image.dtype))
        model.visual.to(memory_format=torch.channels_last)
        cases[name] = lambda model=model: run(model, model.encode_text)
        if name == "mobileclip-s0":
            cases[f"{name}, as published"] = lambda model=model: run(model, lambda text: every_token(model, text))
    shape = f"both: {TEXTS} texts, {IMAGES} images"
    return compare({"op": "towers", "shape": shape, "dtype": dtype, "pass": "inference"}, cases, repeats, base=student)


def every_token(model, text):
    tokens = model.text.encode_tokens(text)
    return tokens[torch.arange(len(text)), text.argmax(1)] @ model.text.text_projection
