"""The objective of a run: a loss of simplclip.losses whose terms have weights that depend on the
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from simplclip import losses
from simplclip.common import ranks
from simplclip.common.terms import BY_NAME, TERMS
from simplclip.train.sections import LossConfig


def terms_of(columns: Iterable[str]) -> dict[str, str]:
    """Returns terms of the loss by their columns, those of metrics.csv that `columns` has."""
    names = {term.column: term.name for term in TERMS}
    return {column: names[column] for column in columns if column in names}


class Objective:
    """A function that computes the weighted terms of a batch at a step of a run by `loss`.

    `loss` has the largest weight of each term, and so the parameters of all terms of the run; each
    step computes its terms with the weights of the step.
    """

    def __init__(
        self, config: LossConfig, steps: int, width: int, teacher: Mapping[str, Any] | None
    ):
        """Makes `loss` for the present ranks, on torch's default device.

        steps: of the whole run. width: D of the student's features. teacher: its "width" D̂ and
        "logit_scale" if any step needs it; projections map student features to another D̂.
        """
        self.schedules, self.steps = config.weights, steps
        self.loss: Any = _make_loss(config, width, teacher)

    def __call__(
        self,
        step: int,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N k, D], k captions of each image
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None,  # []
        group: Tensor | None,  # [N] int64; None: all are different
        *teacher: Tensor,  # features of images [N, D̂] and of texts [N k, D̂], if there is a teacher
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of the weighted terms, and the terms by their columns in metrics.csv.

        Only the sum has gradients. The terms have one order for the whole run. A term of weight 0
        at `step` is not computed and is 0. Each caption of an image makes a pair with the image;
        pairs of one group are not each other's negatives.
        """
        captions = len(text) // len(image)
        if captions > 1:
            if group is None:
                group = torch.arange(len(image), device=image.device)
            group = group.repeat_interleave(captions, 0)
            image = image.repeat_interleave(captions, 0)
            if teacher:
                teacher_image, teacher_text = teacher
                teacher = (teacher_image.repeat_interleave(captions, 0), teacher_text)
        weights = {term: schedule.at(step, self.steps) for term, schedule in self.schedules.items()}
        total, terms = self.loss.terms(
            image,
            text,
            logit_scale,
            weights={term: weight for term, weight in weights.items() if weight},
            logit_bias=logit_bias,
            ids=group,
            teacher=(*teacher, self.loss.teacher_scale) if teacher else None,
        )
        zero = total.new_zeros(())
        return total, {BY_NAME[term].column: terms.get(term, zero) for term in weights}


def _make_loss(config: LossConfig, width: int, teacher: Mapping[str, Any] | None) -> Any:
    """Returns the loss of an `Objective`, made with the largest weight of each term."""
    options: dict[str, Any] = {"rank": ranks.number(), "world_size": ranks.count()}
    for term in TERMS:  # without a teacher, the base has weight 1
        if teacher is None and not term.needs_plane:
            continue
        options.setdefault(term.weight, 0.0)
        if term.name in config.weights:
            options[term.weight] = config.weights[term.name].largest
        if term.choices:
            options[term.name] = getattr(config, term.name)
    if teacher is None and config.base == "sigmoid":
        return losses.SigLipLoss(**options)
    # Gradients are then right after DDP averages them; SigLipLoss always gathers so.
    options["gather_with_grad"] = True
    if teacher is None:
        return losses.ClipPMLoss(**options)
    widths = {"embed_dim": width, "teacher_dim": teacher["width"]}
    loss = losses.WIKDLoss(divergence="kl", **widths, **options)
    # A tensor made from a number at each step would make the CPU wait for a GPU.
    scale = torch.tensor(float(teacher["logit_scale"]))
    loss.register_buffer("teacher_scale", scale, persistent=False)
    return loss
