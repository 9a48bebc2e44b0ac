"""WIKDLoss: the contrastive loss and distillation in three spaces; SigmoidLoss: SigLIP's loss and the same distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip import ops
from simplclip.losses.base import SimilarityLoss, check_width, first_columns, terms_of_sum, weight_of, width_of
from simplclip.ops import checks
from simplclip.ops.registry import autocasts, no_autocast
from simplclip.ops.similarity.call import DIVERGENCES, INTERACTIVE

OF_TEACHER = ("relational", "interactive", "feature")


class WIKDLoss(SimilarityLoss):
    r"""Contrastive loss plus distillation in three spaces, a drop-in replacement of `open_clip.DistillClipLoss`.

        loss = contrastive_weight · ClipLoss + relational_weight · (cross-entropy of the student's to the teacher's softmax of
               the similarities, rows and columns) + interactive_weight · (student against teacher across modalities)
               + feature_weight · (distance of normalised features, mean of image and text) + pm_weight · pair matching

    All similarity terms are computed in one sweep without N×N matrices; see `simplclip.ops.similarity_loss` and
    `simplclip.ops.feature_loss`. With the default weights the values are open_clip's: the relational term is a cross-entropy,
    i.e. the KL divergence plus the entropy of the teacher's softmax, a constant that divergence="kl" leaves out.

    For several teachers, pass tuples as dist_image_features, dist_text_features and dist_logit_scale. The terms of the
    teachers are averaged (the average of the cross-entropies is the cross-entropy to the average softmax). Each teacher after
    the first costs one more sweep.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.DistillClipLoss. use_horovod is not
            supported with several ranks.
        contrastive_weight, relational_weight, interactive_weight, feature_weight, pm_weight: 0 or more; a term with weight 0
            costs nothing and is not returned.
        interactive: "infonce" or "kl".
        divergence: "cross_entropy" or "kl".
        plane, embed_dim: of pair matching, as in ClipPMLoss.
        embed_dim, teacher_dim: D and D̂ (a tuple for several teachers); where they differ, the interactive and feature terms
            project the student's features by learned `image_projections` and `text_projections` [D̂, D].

    Source: open_clip.loss.DistillClipLoss; Yang et al. 2023 (CLIP-KD, arXiv 2307.12732); arXiv 2411.14789 for WIKD.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        contrastive_weight: float = 1.0,
        relational_weight: float = 1.0,
        interactive_weight: float = 0.0,
        interactive: str = "infonce",
        feature_weight: float = 0.0,
        divergence: str = "cross_entropy",
        pm_weight: float = 0.0,
        plane: str = "scalar",
        embed_dim: int | None = None,
        teacher_dim: int | tuple[int, ...] | None = None,
    ):
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod,
            pm_weight=pm_weight, plane=plane, embed_dim=embed_dim,
        )  # fmt: skip
        self.contrastive_weight = weight_of("contrastive_weight", contrastive_weight)
        self.relational_weight = weight_of("relational_weight", relational_weight)
        self.interactive_weight = weight_of("interactive_weight", interactive_weight)
        self.feature_weight = weight_of("feature_weight", feature_weight)
        checks.choice("interactive", interactive, INTERACTIVE)
        checks.choice("divergence", divergence, DIVERGENCES)
        self.interactive, self.divergence = interactive, divergence
        if not (contrastive_weight or relational_weight or interactive_weight or feature_weight or pm_weight):
            raise ValueError("contrastive_weight and the other weights: expected one above 0, got all 0")
        widths = teacher_dim if isinstance(teacher_dim, (tuple, list)) else (teacher_dim,)
        self.teacher_dim = tuple(width_of("teacher_dim", width) for width in widths)
        if any(widths) and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the student's features, beside a teacher_dim, got None")
        self.image_projections = self.text_projections = None
        project = interactive_weight or feature_weight
        projected = [width if project and width not in (None, embed_dim) else 0 for width in widths]
        if any(projected):
            self.image_projections, self.text_projections = (
                nn.ParameterList(nn.Parameter(torch.randn(width, embed_dim) * embed_dim**-0.5) for width in projected)
                for _ in range(2)
            )

    def extra_repr(self) -> str:
        names = ("contrastive", "relational", "interactive", "feature", "pm")
        weights = ", ".join(f"{name}_weight={getattr(self, f'{name}_weight')}" for name in names)
        return f"{weights}, interactive={self.interactive!r}, divergence={self.divergence!r}"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        dist_image_features: Tensor | tuple[Tensor, ...],  # [N, D̂]
        dist_text_features: Tensor | tuple[Tensor, ...],  # [N, D̂]
        dist_logit_scale: Tensor | tuple[Tensor, ...],  # []
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,  # [N] int64
    ) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Returns the weighted terms in this order, without those of weight 0; with output_dict, a dict with these keys:

        `contrastive_loss`, `distill_loss` (relational), `interactive_loss`, `feature_loss`, `pair_matching_loss`.
        """
        image, text = self._own_features(image_features, text_features)
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        return self._of(image, text, logit_scale, *teacher, output_dict, ids=ids)

    def _of(
        self, image, text, logit_scale, dist_image_features, dist_text_features, dist_logit_scale, output_dict=False, ids=None
    ) -> Any:
        teachers = self._teachers(dist_image_features, dist_text_features, dist_logit_scale)
        weights = {
            "contrastive": self.contrastive_weight,
            "relational": self.relational_weight,
            "interactive": self.interactive_weight,
            "feature": self.feature_weight,
            "pair_matching": self.pm_weight,
        }
        totals: dict[str, Any] = {}
        for index, teacher in enumerate(teachers):
            share = {
                name: weight / len(teachers) if name in OF_TEACHER else weight
                for name, weight in weights.items()
                if weight and (index == 0 or name in OF_TEACHER)
            }
            projected = self._projected(index, image, text, teacher)
            values: dict[str, Any] = {}
            if terms := tuple(name for name in share if name != "feature"):
                options: dict[str, Any] = {"interactive": self.interactive, "divergence": self.divergence, "ids": ids}
                if "relational" in share or "interactive" in share:
                    options |= zip(("teacher_image", "teacher_text", "teacher_scale"), teacher)
                if "interactive" in share:
                    unit = (None if p is None else F.normalize(p, dim=-1).to(image.dtype) for p in projected)
                    options |= zip(("projected_image", "projected_text"), unit)
                values = self._terms(terms, image, text, logit_scale=logit_scale, **options)
            if "feature" in share:
                pairs = ((wide(own) if p is None else p, t) for own, p, t in zip((image, text), projected, teacher))
                with no_autocast(image.device) if _autocasts_to_half(image.device) else contextlib.nullcontext():
                    values["feature"] = 0.5 * sum(ops.feature_loss(s, t) for s, t in pairs)
            for name, weight in share.items():
                totals[name] = totals.get(name, 0) + weight * values[name]
        keys = {"relational": "distill_loss"}  # open_clip's name, kept in this drop-in alone
        losses = {keys.get(name, f"{name}_loss"): self._value(total) for name, total in totals.items()}
        return losses if output_dict else tuple(losses.values())

    def _teachers(self, images, texts, scales) -> list[tuple[Tensor, Tensor, Tensor]]:
        if not isinstance(images, (tuple, list)):
            images, texts, scales = (images,), (texts,), (scales,)
        given = {"dist_image_features": images, "dist_text_features": texts, "dist_logit_scale": scales}
        for name, value in given.items():
            if not isinstance(value, (tuple, list)) or len(value) != len(images) or not images:
                count = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
                raise ValueError(f"{name}: expected one for each of {len(images)} teachers, got {count}")
        if any(self.teacher_dim) and len(self.teacher_dim) != len(images):
            raise ValueError(f"teacher_dim: expected one width for each of {len(images)} teachers, got {self.teacher_dim}")
        return list(zip(images, texts, scales))

    def _projected(self, index: int, image: Tensor, text: Tensor, teacher) -> list[Tensor | None]:
        """Returns the student's features projected to the width of this teacher; None where no projection is needed."""
        width = self.teacher_dim[index] if any(self.teacher_dim) else None
        projected: list[Tensor | None] = []
        both: tuple = (None, None)
        if self.image_projections is not None and self.image_projections[index].numel():
            both = self._learned(self.image_projections[index], self.text_projections[index])
        for side, own, t, weight in zip(("image", "text"), (image, text), teacher, both):
            if isinstance(t, Tensor) and t.dim() == own.dim() == 2:
                check_width(f"dist_{side}_features", t, "teacher_dim", width)
                if width is None and (self.interactive_weight or self.feature_weight) and t.shape[1] != own.shape[1]:
                    raise ValueError(
                        f"teacher_dim: expected {t.shape[1]}, the width of dist_{side}_features, since {side}_features have "
                        f"{own.shape[1]} and interactive and feature terms compare them, got None"
                    )
            projected.append(None if weight is None else _project(side, own, first_columns(weight, own)))
        return projected


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
        """Returns the weighted terms that `weights` names. Only the sum of the terms has the right gradient."""
        fused = {name: weights[term] for term, name in self.FUSED.items() if term in weights}
        terms: dict[str, Tensor] = {}
        if fused:
            options = {"logit_scale": logit_scale, "logit_bias": logit_bias, "ids": ids}
            own = self._own_features(image, text)
            values = terms_of_sum(self._terms(tuple(fused), *own, weights=fused, **options), fused)
            terms = {term: self._value(values[name]) for term, name in self.FUSED.items() if name in fused}
        if weights.keys() - terms.keys():
            self.contrastive_weight = self.pm_weight = 0.0  # the forward below computes the other terms alone
            of_teacher = teacher[0], teacher[1], teacher[2]
            taught = named(super().forward(image, text, logit_scale, *of_teacher, output_dict=True, ids=ids))
            terms |= {term: weights[term] * value for term, value in taught.items()}
        return terms


def named(terms: Any) -> dict[str, Tensor]:
    """Renames the terms of a drop-in for open_clip to this library's names: open_clip's distill_loss is relational_loss."""
    return {"relational_loss" if name == "distill_loss" else name: value for name, value in terms.items()}


class _Wide(torch.autograd.Function):
    """A cast of float16 to float32. The gradient of a row of zeros, which 1/eps makes too large, is clamped to float16's
    range; the gradients of other rows may overflow, as GradScaler expects."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value.any(-1, keepdim=True))
        return value.float()

    @staticmethod
    def backward(ctx, gradient):
        (nonzero,) = ctx.saved_tensors
        most = torch.finfo(torch.float16).max
        return torch.where(nonzero, gradient, gradient.clamp(-most, most)).half()


def wide(features: Tensor) -> Tensor:
    """Casts float16 to float32: F.normalize's eps of 1e-12 and the gradient of a row of zeros (1/eps) need its range."""
    return _Wide.apply(features) if features.dtype == torch.float16 else features


def _autocasts_to_half(device: torch.device) -> bool:
    return autocasts(device) and torch.get_autocast_dtype(device.type) == torch.float16


def _project(side: str, features: Tensor, weight: Tensor) -> Tensor:
    """Returns features · weightᵀ, in float32 where autocast or the dtype would make the product float16: see `wide`."""
    if not autocasts(features.device) and weight.dtype != features.dtype:
        raise TypeError(
            f"{side}_features: expected the dtype of {side}_projections, {weight.dtype}, without autocast, "
            f"got {features.dtype}"
        )
    if torch.float64 not in (features.dtype, weight.dtype) and (
        _autocasts_to_half(features.device) or (features.dtype == torch.float16 and not autocasts(features.device))
    ):
        with no_autocast(features.device):
            return F.linear(wide(features).float(), weight.float())
    return F.linear(features, weight)
