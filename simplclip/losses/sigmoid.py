"""The base of SigLIP beside the terms of WIKDLoss, for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from simplclip.losses.base import terms_of_sum
from simplclip.losses.wikd import WIKDLoss


class SigmoidLoss(WIKDLoss):
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
            taught = named(super().forward(image, text, logit_scale, *of_teacher, output_dict=True, ids=ids))
            terms |= {term: weights[term] * value for term, value in taught.items()}
        return terms


def named(terms: Any) -> dict[str, Tensor]:
    """The terms of a drop-in for open_clip by this library's names: open_clip calls the relational one distill_loss."""
    return {"relational_loss" if name == "distill_loss" else name: value for name, value in terms.items()}
