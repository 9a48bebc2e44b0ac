"""WIKDLoss: the contrastive loss and distillation in three spaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip import ops
from simplclip.losses.base import Pairs, SimilarityLoss, Teacher, weight_of, width_of
from simplclip.ops import checks
from simplclip.ops.autocast import no_autocast
from simplclip.ops.similarity.call import DIVERGENCES

INTERACTIVE = ("infonce", "kl")


class WIKDLoss(SimilarityLoss):
    r"""Contrastive loss plus distillation in three spaces, a drop-in replacement of
    `open_clip.DistillClipLoss`.

        loss = contrastive_weight · ClipLoss + relational_weight · (cross-entropy of the student's
        to the teacher's softmax of
               the similarities, rows and columns) + interactive_weight · (student against teacher
               across modalities) + feature_weight · (distance of normalised features, mean of image
               and text) + pm_weight · pair matching

    With the student's features x', y' in the teacher's width, the teacher's x̂, ŷ and its logits T
    = ŝ x̂ ŷᵀ, the interactive term compares U = s x' ŷᵀ and V = s y' x̂ᵀ:

        "infonce"   ½ [ mean_i cross-entropy of U_i to the positive + mean_j that of V_j ]
        "kl"        ½ [ mean_i KL(softmax T_i ‖ softmax U_i)
                        + mean_j KL(softmax of column j of T ‖ softmax V_j) ]

    No term has an N×N matrix; see `simplclip.ops.similarity_loss`, which computes contrastive,
    relational and pair matching in one sweep and each direction of the interactive term in another,
    and `simplclip.ops.feature_loss`. With the default weights the values are open_clip's: the
    relational term is a cross-entropy, i.e. the KL divergence plus the entropy of the teacher's
    softmax, a constant that divergence="kl" leaves out.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in
            open_clip.DistillClipLoss. use_horovod is not supported with several ranks.
        contrastive_weight, relational_weight, interactive_weight, feature_weight, pm_weight: 0 or
            more; a term with weight 0 costs nothing and is not returned.
        interactive: "infonce" or "kl".
        divergence: "cross_entropy" or "kl", of the relational term and of interactive="kl".
        plane, embed_dim: of pair matching, as in ClipPMLoss.
        embed_dim, teacher_dim: D and D̂; where they differ, the interactive and feature terms
            project the student's features by a learned `image_projection` and `text_projection`
            [D̂, D], in float32.

    Source: open_clip.loss.DistillClipLoss; Yang et al. 2023 (CLIP-KD, arXiv 2307.12732); arXiv
    2411.14789 for WIKD.
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
        teacher_dim: int | None = None,
        **unknown: Never,
    ) -> None:
        modes = local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        super().__init__(*modes, pm_weight=pm_weight, plane=plane, embed_dim=embed_dim, **unknown)
        self.contrastive_weight = weight_of("contrastive_weight", contrastive_weight)
        self.relational_weight = weight_of("relational_weight", relational_weight)
        self.interactive_weight = weight_of("interactive_weight", interactive_weight)
        self.feature_weight = weight_of("feature_weight", feature_weight)
        checks.choice("interactive", interactive, INTERACTIVE)
        checks.choice("divergence", divergence, DIVERGENCES)
        self.interactive, self.divergence = interactive, divergence
        self.teacher_dim = width_of("teacher_dim", teacher_dim)
        if not self._weights():
            raise ValueError(
                "contrastive_weight and the other weights: expected one above 0, got all 0"
            )
        dim = self.embed_dim
        if teacher_dim is not None and dim is None:
            raise ValueError(
                "embed_dim: expected the width D of the student's features, beside a teacher_dim, "
                "got None"
            )
        self.image_projection = self.text_projection = None
        if (
            (interactive_weight or feature_weight)
            and teacher_dim is not None
            and dim is not None
            and teacher_dim != dim
        ):
            self.image_projection = nn.Parameter(torch.randn(teacher_dim, dim) * dim**-0.5)
            self.text_projection = nn.Parameter(torch.randn(teacher_dim, dim) * dim**-0.5)

    def extra_repr(self) -> str:
        names = ("contrastive", "relational", "interactive", "feature", "pm")
        weights = ", ".join(f"{name}_weight={getattr(self, f'{name}_weight')}" for name in names)
        return f"{weights}, interactive={self.interactive!r}, divergence={self.divergence!r}"

    def _weights(self) -> dict[str, float]:
        """Returns the weights above 0 by the terms' names."""
        names = ("contrastive", "relational", "interactive", "feature")
        weights = {name: getattr(self, f"{name}_weight") for name in names} | {
            "pair_matching": self.pm_weight
        }
        return {name: weight for name, weight in weights.items() if weight}

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        dist_image_features: Tensor,  # [N, D̂]
        dist_text_features: Tensor,  # [N, D̂]
        dist_logit_scale: Tensor,  # []
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,  # [N] int64
    ) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Returns the weighted terms in this order, without those of weight 0; with output_dict, a
        dict with these keys:

        `contrastive_loss`, `distill_loss` (relational), `interactive_loss`, `feature_loss`,
        `pair_matching_loss`.
        """
        teacher = Teacher(dist_image_features, dist_text_features, dist_logit_scale)
        weights = self._weights()
        values = self._values(
            Pairs(image_features, text_features, logit_scale, None, ids, teacher), tuple(weights)
        )
        keys = {"relational": "distill_loss"}  # open_clip's name
        losses = {
            keys.get(name, f"{name}_loss"): weight * values[name]
            for name, weight in weights.items()
        }
        return losses if output_dict else tuple(losses.values())

    def _similarity(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None
    ) -> dict[str, Tensor]:
        swept = tuple(name for name in terms if name not in ("interactive", "feature"))
        values: dict[str, Any] = {}
        if swept:
            swept_pairs = pairs if "relational" in swept else replace(pairs, teacher=None)
            values = super()._similarity(
                swept_pairs, swept, weights and {name: weights[name] for name in swept}
            )
        if len(swept) == len(terms):
            return values
        teacher: Any = pairs.teacher
        image, text = self._in_teachers_width(pairs.image, pairs.text, teacher)
        if "interactive" in terms:
            values["interactive"] = self._interactive(
                replace(pairs, image=image, text=text), teacher
            )
        if "feature" in terms:
            with no_autocast(image.device):
                of_image, of_text = (
                    ops.feature_loss(wide(x), y)
                    for x, y in ((image, teacher.image), (text, teacher.text))
                )
            values["feature"] = 0.5 * (of_image + of_text)
        if weights is not None:
            for name in set(terms) - set(swept):
                values["loss"] = values.get("loss", 0) + weights[name] * values[name]
                values[name] = values[name].detach()
        return values

    def _interactive(self, pairs: Pairs, teacher: Teacher) -> Tensor:
        """Returns the interactive term of rows whose columns are the teacher's features of all
        ranks, constants.
        """
        term = "contrastive" if self.interactive == "infonce" else "relational"
        offset = self.rank * len(pairs.image) if self.world_size > 1 else 0
        options: dict[str, Any] = {
            "terms": (term,),
            "symmetric": False,
            "divergence": self.divergence,
            "label_offset": offset,
            "ids": pairs.ids,
            "text_ids": self._gathered(pairs.ids),
            "scratch_bytes": self.scratch_bytes,
            "store_bytes": self.store_bytes,
        }
        teacher_image = teacher.image.to(pairs.image.dtype)
        teacher_text = teacher.text.to(pairs.image.dtype)
        loss: Any = 0.0
        for rows, of_rows, columns in (
            (pairs.image, teacher_image, teacher_text),
            (pairs.text, teacher_text, teacher_image),
        ):
            columns = self._gathered(columns)
            if term == "relational":
                options |= {
                    "teacher_image": of_rows,
                    "teacher_text": columns,
                    "teacher_scale": teacher.scale,
                }
            if self.image_projection is not None:
                rows = F.normalize(rows, dim=-1).to(pairs.image.dtype)
            loss = loss + 0.5 * ops.similarity_loss(rows, columns, pairs.scale, **options)[term]
        return loss

    def _in_teachers_width(
        self, image: Tensor, text: Tensor, teacher: Teacher
    ) -> tuple[Tensor, Tensor]:
        """Returns the student's features as such, or projected to the width of the teacher's, and
        not normalised again.
        """
        projects = self.image_projection is not None
        width = self.teacher_dim if projects else image.shape[1]
        if teacher.image.shape[1] != width:
            features = "a prefix of image_features" if self.prefixes else "image_features"
            why = (
                "embed_dim, another teacher_dim, and interactive_weight or feature_weight above 0 "
                "make one"
            )
            expected = (
                f"teacher_dim = {width}"
                if projects
                else f"{width} of {features}, without a projection ({why})"
            )
            raise ValueError(
                f"dist_image_features: expected the width {expected}, got shape "
                f"{checks.shape_of(teacher.image)}"
            )
        if self.image_projection is None or self.text_projection is None:
            return image, text
        of_image, of_text = self._learned(self.image_projection, self.text_projection)
        return _projected(image, of_image), _projected(text, of_text)


class _Wide(torch.autograd.Function):
    """A cast of float16 to float32.

    The gradient of a row of zeros, which 1/eps makes too large, is clamped to float16's range; the
    gradients of other rows may overflow, as GradScaler expects.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value.any(-1, keepdim=True))
        return value.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (nonzero,) = ctx.saved_tensors
        most = torch.finfo(torch.float16).max
        return torch.where(nonzero, gradient, gradient.clamp(-most, most)).half()


def wide(features: Tensor) -> Tensor:
    """Casts float16 to float32: F.normalize's eps of 1e-12 and the gradient of a row of zeros
    (1/eps) need its range.
    """
    return _Wide.apply(features) if features.dtype == torch.float16 else features


def _projected(features: Tensor, weight: Tensor) -> Tensor:
    """Returns features · weightᵀ in float32, or in float64 of float64."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with no_autocast(features.device):
        return F.linear(wide(features).to(dtype), weight[:, : features.shape[1]].to(dtype))
