"""A step of open_clip's trainer, for `simplclip.plan` to predict beside a step of ours; and both,
measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from benchmarks.measure import compare
from benchmarks.training_forms import PRECISION
from simplclip import models
from simplclip.common import hardware
from simplclip.plan import actual
from simplclip.plan.measure import predict
from simplclip.plan.step import Observer, Step, TrainerStep, inputs
from simplclip.train import config

TEACHER_WIDTH = 768
# the models that they are made from
ORIGINALS = {"siclip-s0": "mobileclip-s0", "siclip2-s0": "open_clip:MobileCLIP2-S0"}


class OpenClipStep:
    """A step of open_clip's trainer on a model.

    name, options: as for `models.create`. teacher_width: of stored features for DistillClipLoss;
    None: SigLipLoss for a model with a logit bias, else ClipLoss. Unlike in open_clip's trainer, no
    teacher is in memory.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        precision: str,
        teacher_width: int | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.precision = precision
        self.teacher_width = teacher_width
        self.options = options | {"output_dict": True}
        with torch.device("meta"):
            self.model: Any = models.create(name, device="meta", **self.options).train()
        has_bias = getattr(self.model, "logit_bias", None) is not None
        self.loss: nn.Module = SigLipLoss() if has_bias else ClipLoss()
        if teacher_width is not None:
            self.loss = DistillClipLoss()
        self.modules, self.averages = [self.model, self.loss], list[Tensor]()

    def place(self, device: torch.device, observer: Observer | None) -> None:
        self.device = device
        self.during = observer.during if observer else lambda kind: nullcontext()
        card = device.type == "cuda"
        # torch's default on both devices
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)

    def batches(self, real: bool) -> list[dict[str, Tensor]]:
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.name, self.model, self.batch_size, 1, real)
            batch = {"image": image.float(), "text": text}
            if self.teacher_width is not None:
                shape = self.batch_size, self.teacher_width
                for name in ("dist_image_features", "dist_text_features"):
                    batch[name] = torch.ones(shape, dtype=torch.float16)
        return [batch]

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        (batch,) = batches
        self.optimizer.zero_grad()
        with hardware.autocast(self.precision, self.device):
            with self.during("activations"):
                batch = {name: t.to(self.device) for name, t in batch.items()}
                outputs = self.model(batch.pop("image"), batch.pop("text"))
            with self.during("loss"):
                if batch:
                    dtype = outputs["image_features"].dtype
                    outputs |= {name: t.to(dtype) for name, t in batch.items()}
                    outputs["dist_logit_scale"] = torch.full((), 100.0, device=self.device)
                loss = sum(self.loss(**outputs, output_dict=True).values())
        del outputs, batch
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))


def beside_original(
    name: str, pairs: int, dtype: str, device: torch.device, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row for a step of a config's model and one for the model that it was made from.

    They have time, and peak memory beside its prediction. Weights are random. A step of a SiCLIP is
    a step of `simplclip train`, with unchanged parts inherited and frozen, pair matching and
    distillation from stored features; a step of the other model is open_clip's, with all weights
    trained. strict: as for `compare`.
    """
    changes = ["data.micro_batch=null", "data.captions_per_image=1", "loss.pm_weight=1"]
    values = config.load(name, [*changes, f"data.batch_size={pairs}"])
    model, original = values.model.name, ORIGINALS.get(values.model.name)
    made: dict[str, Callable[[], Step]] = {
        model: lambda: TrainerStep(values, PRECISION[dtype], TEACHER_WIDTH)
    }
    if original:
        made[f"{original}, whole"] = lambda: OpenClipStep(original, pairs, PRECISION[dtype])
    peaks: dict[str, int] = {}
    # after the peaks were measured
    placed = functools.cache(lambda form: actual.runner(made[form](), device))

    def first(form: str) -> None:
        peaks[form] = actual.peak_bytes(made[form](), device)

    what = {"op": "steps", "shape": f"{pairs} pairs", "n": pairs, "dtype": dtype, "pass": "step"}
    cases = {form: lambda form=form: placed(form)() for form in made}
    firsts = {form: partial(first, form) for form in made}
    rows = compare(what, cases, repeats, first=firsts, base=model, strict=strict)
    planned_on = torch.device("cuda", 0) if device.type == "cuda" else device
    for row in rows:
        if "p50_ms" in row:
            planned = predict(made[row["form"]](), planned_on).peak
            row["samples_per_s"] = round(1e3 * pairs / row["p50_ms"], 1)
            row["mib"] = round(peaks[row["form"]] / 2**20, 1)
            row["planned_mib"] = round(planned / 2**20, 1)
    return rows
