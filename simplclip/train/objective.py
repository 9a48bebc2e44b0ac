"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import losses
from simplclip.common import ranks
from simplclip.losses.wikd import SigmoidLoss, named
from simplclip.train.settings import TERMS, LossConfig


class Objective:
    """A function that computes the weighted terms of a batch at a step of a run by `loss`.

    `loss` is a SigmoidLoss for the base sigmoid, else a WIKDLoss with a teacher and a ClipPMLoss without.

    width: D of the student's features, needed with a teacher and for plane="hadamard".
    teacher: the teacher's "width" D̂ and "logit_scale", if any step has a term that needs a teacher.
    If D̂ is not D, learned projections map the student's features to width D̂.
    """

    def __init__(self, config: LossConfig, steps: int, width: int | None, teacher: Mapping[str, Any] | None):
        self.schedules, self.steps, self.teacher = config.weights, steps, teacher
        self.sigmoid = config.base == "sigmoid"
        on: dict[str, Any] = {switch: float(term in self.schedules) for term, switch in TERMS.items()}
        on["contrastive_weight"] += self.sigmoid
        shared: dict[str, Any] = {"plane": config.plane, "embed_dim": width, **ranks.loss_arguments()}
        if teacher is None and not self.sigmoid:
            self.loss: nn.Module = losses.ClipPMLoss(pm_weight=on["pm_weight"], **shared)
            return
        kind = SigmoidLoss if self.sigmoid else losses.WIKDLoss
        self.loss = kind(
            **on,
            **shared,
            teacher_dim=teacher["width"] if teacher else None,
            interactive=config.interactive,
            divergence="kl",
        )

    def __call__(
        self,
        step: int,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N k, D], k captions of each image
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None,  # []
        group: Tensor,  # [N] int64
        teacher_image: Tensor | None = None,  # [N, D̂]
        teacher_text: Tensor | None = None,  # [N k, D̂]
    ) -> dict[str, Tensor]:
        """Returns the terms by name, in one order for the whole run. A term of weight 0 at `step` is not computed and is 0.

        Each caption of an image makes a pair with the image; pairs of one group are not each other's negatives.
        """
        weights = {term: schedule.at(step, self.steps) for term, schedule in self.schedules.items()}
        off = image.new_zeros((), dtype=torch.float32)
        captions = len(text) // len(image)
        if captions > 1:
            of_images = (image, group, teacher_image)
            image, group, teacher_image = (None if t is None else t.repeat_interleave(captions, 0) for t in of_images)
        for term in weights.keys() & TERMS.keys():
            setattr(self.loss, TERMS[term], float(weights[term] > 0))
        teacher: tuple = ()
        if self.teacher is not None:
            teacher = teacher_image, teacher_text, torch.tensor(self.teacher["logit_scale"], device=image.device)
        if self.sigmoid:
            on = {term: weight for term, weight in weights.items() if weight}
            terms = self.loss(image, text, logit_scale, logit_bias, on, *teacher, ids=group)
        else:
            options = {"output_dict": True, "ids": group}
            terms = named(self.loss(image, text, logit_scale, *(teacher or (logit_bias,)), **options))
            terms = {term: weights[term] * value for term, value in terms.items()}
        return {term: terms.get(term, off) for term in weights}
