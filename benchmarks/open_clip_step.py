"""A step of open_clip's trainer on a model, for `simplclip.memory` to predict or measure beside a step of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from simplclip import models
from simplclip.common import hardware
from simplclip.memory.step import During, inputs


class OpenClipStep:
    """A step of open_clip's trainer on a model, with its loss for that model or with stored teacher features.

    name, options: as for `models.create`. teacher_width: the width of a teacher's features for DistillClipLoss; None:
    SigLipLoss for a model with a logit bias, else ClipLoss. No teacher is in memory, unlike in open_clip's own trainer.
    """

    def __init__(self, name: str, batch_size: int, precision: str, teacher_width: int | None = None, **options: Any) -> None:
        self.name, self.batch_size, self.precision, self.teacher_width = name, batch_size, precision, teacher_width
        self.options = options | {"output_dict": True}
        with torch.device("meta"):
            self.model: Any = models.create(name, device="meta", **self.options).train()

    def start(self) -> RunningOpenClip:
        return RunningOpenClip(self.model, self.precision, distilled=self.teacher_width is not None)

    def batches(self, real: bool) -> list[dict[str, Tensor]]:
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.name, self.model, self.batch_size, 1, real)
            batch = {"image": image.float(), "text": text}
            if self.teacher_width is not None:
                for name in ("dist_image_features", "dist_text_features"):
                    batch[name] = torch.ones(self.batch_size, self.teacher_width, dtype=torch.float16)
        return [batch]


class RunningOpenClip:
    """A step of open_clip's trainer with its model."""

    def __init__(self, model: Any, precision: str, distilled: bool) -> None:
        self.model, self.precision = model, precision
        if distilled:
            self.loss = DistillClipLoss()
        else:
            self.loss = ClipLoss() if getattr(model, "logit_bias", None) is None else SigLipLoss()
        self.modules, self.averages = [model, self.loss], list[Tensor]()

    def place(self, device: torch.device, during: During) -> None:
        self.device, self.during = device, during
        card = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)  # torch's default on both devices

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        (batch,) = batches
        self.optimizer.zero_grad()
        with hardware.autocast(self.precision, self.device):
            with self.during("encode", "activations"):
                batch = {name: t.to(self.device) for name, t in batch.items()}
                outputs = self.model(batch.pop("image"), batch.pop("text"))
            with self.during("loss", "loss"):
                if batch:
                    batch = {name: t.to(outputs["image_features"].dtype) for name, t in batch.items()}
                    outputs |= batch | {"dist_logit_scale": torch.full((), 100.0, device=self.device)}
                loss = sum(self.loss(**outputs, output_dict=True).values())
        del outputs, batch
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
