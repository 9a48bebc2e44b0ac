"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simplclip import losses
from simplclip.common import ranks
from simplclip.train.config import LossConfig


class Objective:
    """A function that computes the weighted terms of a batch at a step of a run by `loss`.

    `loss` is a WIKDLoss with a teacher, else a SigLipLoss for the base sigmoid and a ClipPMLoss for
    the base contrastive.

    width: D of the student's features.
    teacher: the teacher's "width" D̂ and "logit_scale", if any step has a term that needs a
    teacher. If D̂ is not D, learned projections map the student's features to width D̂.
    """

    def __init__(
        self, config: LossConfig, steps: int, width: int, teacher: Mapping[str, Any] | None
    ):
        self.schedules, self.steps = config.weights, steps
        shared: dict[str, Any] = {
            "pm_weight": float("pair_matching_loss" in self.schedules),
            "plane": config.plane,
        }
        shared |= {"embed_dim": width, "rank": ranks.number(), "world_size": ranks.count()}
        # Gradients are then right after DDP averages them; SigLipLoss always gathers so.
        gather: dict[str, Any] = {"gather_with_grad": True}
        if teacher is not None:
            shared |= {
                f"{term}_weight": float(f"{term}_loss" in self.schedules)
                for term in ("interactive", "feature")
            }
            shared |= {
                "interactive": config.interactive,
                "divergence": "kl",
                "teacher_dim": teacher["width"],
            }
            self.loss: Any = losses.WIKDLoss(**shared, **gather)
            # A tensor made from a number at each step would make the CPU wait for a GPU.
            self.loss.register_buffer(
                "teacher_scale", torch.tensor(float(teacher["logit_scale"])), persistent=False
            )
        else:
            self.loss = (
                losses.SigLipLoss(**shared)
                if config.base == "sigmoid"
                else losses.ClipPMLoss(**shared, **gather)
            )

    def __call__(
        self,
        step: int,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N k, D], k captions of each image
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None,  # []
        group: Tensor | None,  # [N] int64; None: all are different
        teacher_image: Tensor | None = None,  # [N, D̂]
        teacher_text: Tensor | None = None,  # [N k, D̂]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of the weighted terms, which has the gradient, and the terms by name
        without gradients.

        The terms have one order for the whole run. A term of weight 0 at `step` is not computed and
        is 0. Each caption of an image makes a pair with the image; pairs of one group are not each
        other's negatives.
        """
        weights = {term: schedule.at(step, self.steps) for term, schedule in self.schedules.items()}
        captions = len(text) // len(image)
        if captions > 1:
            group = torch.arange(len(image), device=image.device) if group is None else group
            of_images = (image, group, teacher_image)
            image, group, teacher_image = (
                None if t is None else t.repeat_interleave(captions, 0) for t in of_images
            )
        teacher = (
            None
            if teacher_image is None
            else (teacher_image, teacher_text, self.loss.teacher_scale)
        )
        on = {term.removesuffix("_loss"): weight for term, weight in weights.items() if weight}
        total, terms = self.loss.terms(
            image, text, logit_scale, weights=on, logit_bias=logit_bias, ids=group, teacher=teacher
        )
        off = total.new_zeros(())
        return total, {term: terms.get(term.removesuffix("_loss"), off) for term in weights}
