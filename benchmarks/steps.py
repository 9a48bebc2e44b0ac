"""A step of open_clip's trainer, for `simplclip.plan` to predict beside a step of ours; and both,
measured.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.measure import compare, cpu_peak_bytes
from benchmarks.training_forms import PRECISION
from simplclip import models
from simplclip.common import hardware
from simplclip.plan.measure import predict
from simplclip.plan.step import During, Step, TrainerStep, inputs
from simplclip.train import config

TEACHER_WIDTH = 768
# the models that they are made from
ORIGINALS = {"siclip-s0": "mobileclip-s0", "siclip2-s0": "open_clip:MobileCLIP2-S0"}


class OpenClipStep:
    """A step of open_clip's trainer on a model, with its loss for that model or with stored teacher
    features.

    name, options: as for `models.create`. teacher_width: the width of a teacher's features for
    DistillClipLoss; None: SigLipLoss for a model with a logit bias, else ClipLoss. No teacher is in
    memory, unlike in open_clip's own trainer.
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
        if teacher_width is not None:
            self.loss: Any = DistillClipLoss()
        else:
            self.loss = (
                ClipLoss() if getattr(self.model, "logit_bias", None) is None else SigLipLoss()
            )
        self.modules, self.averages = [self.model, self.loss], list[Tensor]()

    def place(self, device: torch.device, during: During) -> None:
        self.device, self.during = device, during
        card = device.type == "cuda"
        # torch's default on both devices
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)

    def batches(self, real: bool) -> list[dict[str, Tensor]]:
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.name, self.model, self.batch_size, 1, real)
            batch = {"image": image.float(), "text": text}
            if self.teacher_width is not None:
                for name in ("dist_image_features", "dist_text_features"):
                    batch[name] = torch.ones(
                        self.batch_size, self.teacher_width, dtype=torch.float16
                    )
        return [batch]

    def skip(self, tower: str, batch: dict[str, Tensor], first: dict[str, Tensor]) -> None:
        """Nothing is cached."""

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        (batch,) = batches
        self.optimizer.zero_grad()
        with hardware.autocast(self.precision, self.device):
            with self.during("activations"):
                batch = {name: t.to(self.device) for name, t in batch.items()}
                outputs = self.model(batch.pop("image"), batch.pop("text"))
            with self.during("loss"):
                if batch:
                    batch = {
                        name: t.to(outputs["image_features"].dtype) for name, t in batch.items()
                    }
                    outputs |= batch | {
                        "dist_logit_scale": torch.full((), 100.0, device=self.device)
                    }
                loss = sum(self.loss(**outputs, output_dict=True).values())
        del outputs, batch
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))


STEPS = 2  # measured ones; in the second one the optimizer's state exists from the beginning


def runner(step: Step, device: torch.device) -> Callable[[], object]:
    """Returns a function that runs the step on real tensors on `device`, with random weights."""
    return _placed(step, device)[1]


def measure(step: Step, device: torch.device) -> int:
    """Runs the step; returns the peak bytes of torch's allocator on `device`, with parameters, on a
    CPU also the batch.
    """
    before, once = _placed(step, device)

    def run() -> None:
        for _ in range(STEPS):
            once()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in before
    }
    return sum(storages.values()) + cpu_peak_bytes(run)


def _placed(step: Step, device: torch.device) -> tuple[list[Tensor], Callable[[], object]]:
    """Returns the tensors that are in memory before a step on `device`, and a function that runs
    it.
    """
    step = copy.copy(step)  # what `place` makes is of this run
    for module in step.modules:
        _fill(module.to_empty(device=device))
    step.place(device, lambda kind: nullcontext())
    batches = step.batches(real=True)
    weights = [
        tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers())
    ]
    return tree_leaves([weights, step.averages, batches]), partial(step.run, batches)


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Gives a module values with which a step runs."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # of a norm
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            tensor.fill_(1)
        elif name.endswith("attn_mask"):  # of a causal tower, which checks it
            tensor.fill_(-torch.inf).triu_(1)
        elif isinstance(tensor, nn.Parameter):
            tensor.normal_(0, 0.02)
        else:
            tensor.zero_()


def beside_original(
    name: str, pairs: int, dtype: str, device: torch.device, repeats: int, strict: bool = True
) -> list[dict]:
    """Returns a row for a step of a config's model and one for the model that it was made from:
    time, and peak memory beside its prediction. strict: as for `measure.compare`.

    Weights are random. A step of a SiCLIP is a step of `simplclip train`, with unchanged parts
    inherited and frozen, pair matching and distillation from stored features; a step of the other
    model is open_clip's, with all weights trained.
    """
    changes = [
        "data.micro_batch=null",
        "data.captions_per_image=1",
        f"data.batch_size={pairs}",
        "loss.pm_weight=1",
    ]
    values = config.load(name, changes)
    model, original = values.model.name, ORIGINALS.get(values.model.name)
    made: dict[str, Callable[[], Step]] = {
        model: lambda: TrainerStep(values, PRECISION[dtype], TEACHER_WIDTH)
    }
    if original:
        made[f"{original}, whole"] = lambda: OpenClipStep(original, pairs, PRECISION[dtype])
    peaks: dict[str, int] = {}
    # after the peaks were measured
    placed = functools.cache(lambda form: runner(made[form](), device))

    def first(form: str) -> None:
        peaks[form] = measure(made[form](), device)

    what = {"op": "steps", "shape": f"{pairs} pairs", "n": pairs, "dtype": dtype, "pass": "step"}
    cases = {form: lambda form=form: placed(form)() for form in made}
    rows = compare(
        what,
        cases,
        repeats,
        first={form: partial(first, form) for form in made},
        base=model,
        strict=strict,
    )
    for row in rows:
        if "p50_ms" in row:
            planned = predict(
                made[row["form"]](), torch.device("cuda", 0) if device.type == "cuda" else device
            ).peak
            row["samples_per_s"] = round(1e3 * pairs / row["p50_ms"], 1)
            row |= {
                "mib": round(peaks[row["form"]] / 2**20, 1),
                "planned_mib": round(planned / 2**20, 1),
            }
    return rows
