"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import losses
from simplclip.train.config import TERMS, ConfigError, LossConfig


def make_loss(config: LossConfig, width: int | None, teacher: Mapping[str, Any] | None) -> nn.Module:
    """ClipPMLoss, or WIKDLoss if any step has a term of a teacher, with every weight 1.

    width: D of the student's features, needed with a teacher and for plane="hadamard". teacher: its "width" D̂.
    Raises ConfigError for a teacher of another width without loss.projection.
    """
    on = {switch: float(term in config.weights) for term, switch in TERMS.items()}
    shared = {"plane": config.plane, "negatives": config.negatives, "embed_dim": width}
    if not config.needs_teacher:
        return losses.ClipPMLoss(pm_weight=on["pm_weight"], **shared)
    across = {"feature_loss", "interactive_loss"} & config.weights.keys()
    if across and teacher["width"] != width and not config.projection:
        raise ConfigError(
            f"loss.projection: expected true, since the teacher's features have width {teacher['width']} and the student's "
            f"{width}, and {' and '.join(sorted(across)).replace('_loss', '')} distillation compares them; got false"
        )
    return losses.WIKDLoss(
        **on,
        **shared,
        teacher_dim=teacher["width"] if config.projection else None,
        interactive=config.interactive,
        learn_interactive_scale=config.learn_interactive_scale,
        feature_distance=config.feature_distance,
        divergence="kl",
    )


class Objective:
    """Computes the weighted terms of a batch at a step of a run. loss: the module that make_loss returned."""

    def __init__(self, config: LossConfig, loss: nn.Module, steps: int, teacher: Mapping[str, Any] | None):
        self.schedules, self.loss, self.steps, self.teacher = config.weights, loss, steps, teacher

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
        """The terms by name, in one order for the whole run; a term of weight 0 at `step` is 0 and not computed.

        Each caption of an image makes a pair with it; pairs of one group are not each other's negatives.
        """
        captions = len(text) // len(image)
        if captions > 1:
            of_images = (image, group, teacher_image)
            image, group, teacher_image = (None if t is None else t.repeat_interleave(captions, 0) for t in of_images)
        weights = {term: schedule.at(step, self.steps) for term, schedule in self.schedules.items()}
        for term, weight in weights.items():
            setattr(self.loss, TERMS[term], float(weight > 0))
        options = {"output_dict": True, "ids": group}
        if self.teacher is None:
            terms = self.loss(image, text, logit_scale, logit_bias, **options)
        else:
            scale = torch.tensor(self.teacher["logit_scale"], device=image.device)
            terms = self.loss(image, text, logit_scale, teacher_image, teacher_text, scale, **options)
        off = image.new_zeros((), dtype=torch.float32)
        return {term: weight * terms[term] if weight else off for term, weight in weights.items()}
