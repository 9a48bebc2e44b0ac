"""siclip-s0 against MobileCLIP-S0, which it was made from: single blocks, and the whole step of training.

    OMP_NUM_THREADS=1 pytest benchmarks/test_siclip_s0.py --repeats 5 --write

Random weights, random pairs in memory, no loader. A step of siclip-s0 is a step of `simplclip train`: unchanged parts are
inherited and frozen, with pair matching and distillation from stored features. A step of MobileCLIP-S0 is open_clip's, with
its contrastive loss and all weights trained. Forms take turns within a round.
"""

import pytest
import torch

from benchmarks.block_forms import saved_bytes
from benchmarks.measure import clock_of_steps, figures, interleaved_times
from benchmarks.steps import OpenClipStep, runner
from simplclip import models
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.memory.step import TrainerStep
from simplclip.train import config

NAMES = {"simplclip": "siclip-s0", "mobileclip": "mobileclip-s0"}
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
SHAPES = {"text": (32, 77, 512), "image": (16, 512, 8, 8)}
PLACES = {"text": "text.transformer.resblocks.0", "image": "visual.trunk.stages.3.blocks.0"}
CPU, BATCH = torch.device("cpu"), 16


def measured(benchmark, request, cases):
    repeats = request.config.getoption("--repeats")
    name, clock = clock_of_steps()
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats, 1, clock), rounds=1)
    how = {"threads": torch.get_num_threads(), "clock": name, "repeats": repeats}
    return {key: how | figures(times, key) for key in cases}


@pytest.mark.parametrize("tower", SHAPES)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_blocks(benchmark, rows, request, backward, dtype, tower):
    torch.manual_seed(0)
    kind, shape = getattr(torch, dtype), SHAPES[tower]
    blocks = {key: models.create(name).get_submodule(PLACES[tower]).to(kind).train() for key, name in NAMES.items()}
    x = torch.randn(shape, dtype=kind)

    def forward(block):
        with torch.no_grad():
            block(x)

    def both(block):
        block(x.detach().requires_grad_()).sum().backward()

    cases = {key: lambda block=block: (both if backward else forward)(block) for key, block in blocks.items()}
    for key, found in measured(benchmark, request, cases).items():
        parameters = sum(p.numel() for p in blocks[key].parameters())
        saved = round(saved_bytes(blocks[key], x) / 2**20, 1) if backward else ""
        where = f"{tower}: {' × '.join(map(str, shape))}"
        row = {"op": "siclip_s0_blocks", "shape": where, "dtype": dtype, "pass": "forward" + " + backward" * backward}
        rows.append(row | {"form": f"a block of {NAMES[key]}", **found, "saved_mib": saved, "parameters": parameters})


@pytest.mark.parametrize("dtype", PRECISION)
def test_steps(benchmark, rows, request, dtype):
    torch.manual_seed(0)
    changes = ["data.micro_batch=null", "data.captions_per_image=1", f"data.batch_size={BATCH}", "loss.pm_weight=1"]
    ours = config.load("siclip-s0", changes)
    steps = {
        "simplclip": TrainerStep(ours, PRECISION[dtype], teacher_width=512),
        "mobileclip": OpenClipStep("mobileclip-s0", BATCH, PRECISION[dtype]),
    }
    cases = {key: runner(step, CPU) for key, step in steps.items()}
    forms = {
        "simplclip": "siclip-s0, inherited, all of WIKD and pair matching",
        "mobileclip": "mobileclip-s0 whole, ClipLoss",
    }
    for key, found in measured(benchmark, request, cases).items():
        row = {"op": "siclip_s0_step", "shape": f"{BATCH} pairs", "dtype": dtype, "pass": "step", "form": forms[key]}
        extra = round(cpu_peak_bytes(cases[key]) / 2**20)
        rows.append(row | found | {"samples_per_s": round(1e3 * BATCH / found["p50_ms"], 1), "extra_mib": extra})
