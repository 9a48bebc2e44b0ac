"""A training step of models with inherited parts: the frozen parts as they are, and folded.

    OMP_NUM_THREADS=1 pytest benchmarks/test_frozen_prefix.py --repeats 7 --write

A step is forward, contrastive and pair matching loss, backward, clipping and AdamW on random pairs held in memory; no loader.
The forms start from the same weights and take turns; their losses are compared first.
"""

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.measure import clock_of_steps, figures, interleaved_times
from benchmarks.test_training import PRECISION, Ours, Run
from simplclip import models
from simplclip.common import hardware
from simplclip.losses import ClipPMLoss
from simplclip.models.frozen import FrozenParts
from simplclip.models.inherit import freeze, inherit
from simplclip.train import config

BEFORE, FOLDED = "as it is", "folded, channels_last"
BATCHES = {"siclip-s0": (16, 1), "siclip2-s0": (16, 1), "siclip-lite0": (192, 2)}  # images, and captions of each


class FrozenRun(Run):
    def forward(self, image: Tensor, text: Tensor, teacher) -> Tensor:
        with hardware.autocast(self.precision, torch.device("cpu")):
            x = self.model.encode_image(image, normalize=True)
            y = self.model.encode_text(text, normalize=True)
            return self.loss(x.repeat_interleave(len(y) // len(x), 0), y, self.model.logit_scale.exp())


def inherited(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.create(name)
    if name == "siclip-lite0":
        freeze(model, ["visual.trunk.patch_embed.backbone", "text.token_embedding"])
    else:
        inherit(model, models.create(name, simplified=False), train=config.load(name).inherit.train)
    return model.train()


def make(name: str, precision: str) -> dict[str, tuple[Run, tuple]]:
    """Returns the forms, each with its batch of pairs."""
    model, (count, captions) = inherited(name), BATCHES[name]
    side = model.visual.image_size
    image = torch.rand(count, 3, *(side if isinstance(side, tuple) else (side, side)))
    image = image.contiguous(memory_format=torch.channels_last)
    words = ("cat", "dog", "ship", "tree")
    text = models.tokenizer(name)([f"a photo of {n} {words[n % 4]}s" for n in range(count * captions)])
    forms = {}
    for form in (BEFORE, FOLDED):
        own = copy.deepcopy(model)
        if form == FOLDED:
            FrozenParts(own, hardware.DTYPES[precision])
        run = FrozenRun(own, Ours(ClipPMLoss()), precision)
        run.parameters = [p for p in run.parameters if p.requires_grad]
        forms[form] = run, (image, text, ())
    return forms


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", PRECISION)
def test_steps(benchmark, rows, request, dtype, name):
    forms = make(name, PRECISION[dtype])
    losses = {form: run.step(*pairs).item() for form, (run, pairs) in forms.items()}
    assert max(losses.values()) - min(losses.values()) <= (1e-3 if dtype == "float32" else 2e-2) * losses[BEFORE], losses
    repeats = request.config.getoption("--repeats")
    cases = {form: lambda run=run, pairs=pairs: run.step(*pairs) for form, (run, pairs) in forms.items()}
    clock_name, clock = clock_of_steps()
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats, 1, clock), rounds=1)
    count = BATCHES[name][0]
    for form in forms:
        measured = figures(times, form, BEFORE)
        measured["times_unfolded"] = measured.pop("times_ours")
        rows.append(
            {
                "op": "frozen_prefix",
                "objective": "contrastive, pair matching",
                "n": count,
                "shape": name,
                "dtype": dtype,
                "pass": "step",
                "form": form,
                "threads": torch.get_num_threads(),
                "clock": clock_name,
                "repeats": repeats,
                **measured,
                "samples_per_s": round(1e3 * count / measured["p50_ms"], 1),
            }
        )
