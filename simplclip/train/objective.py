"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simplclip import losses
from simplclip.losses.base import terms_of_sum
from simplclip.train import ranks
from simplclip.train.config import ConfigError
from simplclip.train.settings import TERMS, LossConfig


class SigmoidLoss(losses.WIKDLoss):
    """SigLIP's loss and pair matching in one sweep, and beside them the terms of WIKDLoss that need a teacher."""

    FUSED: ClassVar[dict[str, str]] = {"sigmoid_loss": "sigmoid", "pair_matching_loss": "pair_matching"}

    def forward(  # type: ignore[override]
        self,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None,  # []
        weights: Mapping[str, float],
        *teacher: Any,  # features [N, D̂], [N, D̂] and scale []
        ids: Tensor,  # [N] int64
    ) -> dict[str, Tensor]:
        """The weighted terms that `weights` names. Gradients are those of their sum."""
        fused = {name: weights[term] for term, name in self.FUSED.items() if term in weights}
        terms: dict[str, Tensor] = {}
        if fused:
            options = {"logit_scale": logit_scale, "logit_bias": logit_bias, "ids": ids}
            own = self._own_features(image, text)
            values = terms_of_sum(self._terms(tuple(fused), *own, weights=fused, **options), fused)
            terms = {term: self._value(values[name]) for term, name in self.FUSED.items() if name in fused}
        if weights.keys() - terms.keys():
            self.contrastive_weight = self.pm_weight = 0.0  # what follows has the other terms alone
            of_teacher = teacher[0], teacher[1], teacher[2]
            taught = _named(super().forward(image, text, logit_scale, *of_teacher, output_dict=True, ids=ids))
            terms |= {term: weights[term] * value for term, value in taught.items()}
        return terms


class Objective:
    """Computes the weighted terms of a batch at a step of a run by `loss`.

    It is ClipPMLoss, with a teacher WIKDLoss, and for the base sigmoid SigmoidLoss.

    width: D of the student's features, needed with a teacher and for plane="hadamard".
    teacher: its "width" D̂ and "logit_scale", if any step has a term of a teacher.
    Raises ConfigError for a teacher of another width without loss.projection.
    """

    def __init__(self, config: LossConfig, steps: int, width: int | None, teacher: Mapping[str, Any] | None):
        self.schedules, self.steps, self.teacher = config.weights, steps, teacher
        self.sigmoid = config.base == "sigmoid"
        on: dict[str, Any] = {switch: float(term in self.schedules) for term, switch in TERMS.items()}
        on["contrastive_weight"] += self.sigmoid
        shared: dict[str, Any] = {"plane": config.plane, "embed_dim": width, **ranks.of_loss()}
        if teacher is None and not self.sigmoid:
            self.loss: nn.Module = losses.ClipPMLoss(pm_weight=on["pm_weight"], **shared)
            return
        across = {"feature_loss", "interactive_loss"} & self.schedules.keys()
        if teacher and across and teacher["width"] != width and not config.projection:
            raise ConfigError(
                f"loss.projection: expected true, since the teacher's features have width {teacher['width']} and the "
                f"student's {width}, and {' and '.join(sorted(across)).replace('_loss', '')} distillation compares them; "
                "got false"
            )
        kind = SigmoidLoss if self.sigmoid else losses.WIKDLoss
        self.loss = kind(
            **on,
            **shared,
            teacher_dim=teacher["width"] if teacher and config.projection else None,
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
        """The terms by name, in one order for the whole run; a term of weight 0 at `step` is 0 and not computed.

        Each caption of an image makes a pair with it; pairs of one group are not each other's negatives.
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
            terms = _named(self.loss(image, text, logit_scale, *(teacher or (logit_bias,)), **options))
            terms = {term: weights[term] * value for term, value in terms.items()}
        return {term: terms.get(term, off) for term in weights}


def _named(terms: Any) -> dict[str, Tensor]:
    """The terms of a drop-in for open_clip by this library's names: open_clip calls the relational one distill_loss."""
    return {"relational_loss" if name == "distill_loss" else name: value for name, value in terms.items()}
