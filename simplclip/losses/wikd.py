"""WIKDLoss: the contrastive loss and distillation in three spaces."""

from __future__ import annotations

from typing import Any, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip import ops
from simplclip.calls.similarity import DIVERGENCES
from simplclip.common.terms import BY_NAME, TEACHER_TERMS, TERMS
from simplclip.losses.base import NAMES, checked_weight, checked_width
from simplclip.losses.clip import SimilarityLoss
from simplclip.losses.widen import widen
from simplclip.ops import checks
from simplclip.ops.modes import no_autocast
from simplclip.ops.similarity import inputs

_TERMS = tuple(term for term in TERMS if term.name != "sigmoid")


class WIKDLoss(SimilarityLoss):
    r"""Contrastive loss plus distillation in three spaces, for `open_clip.DistillClipLoss`.

        loss = contrastive_weight · ClipLoss
             + relational_weight · (cross-entropy of the student's to the teacher's softmax of the
               similarities, rows and columns)
             + interactive_weight · (student against teacher across modalities)
             + feature_weight · (distance of normalised features, mean of image and text)
             + pm_weight · pair matching

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
        embed_dim, teacher_dim: D, the width that all features must have, and D̂; where they differ,
            the interactive and feature terms project the student's features by a learned
            `image_projection` and `text_projection` [D̂, D], in float32.

    Source: open_clip.loss.DistillClipLoss; Yang et al. 2023 (CLIP-KD, arXiv 2307.12732); arXiv
    2411.14789 for WIKD.
    """

    NAMES = (*SimilarityLoss.NAMES, *[term.name for term in TERMS if not term.sweeps])
    # True within MatryoshkaLoss: features narrower than embed_dim use projections' first columns
    prefixes = False

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
        embed_dim: int | None = None,
        teacher_dim: int | None = None,
        **unknown: Never,
    ) -> None:
        """Stores the settings, and makes the plane's parameters and the projections if needed.

        The projections are None unless embed_dim and teacher_dim differ and the interactive or the
        feature term counts; initial weights are drawn from torch's generator. Raises ValueError or
        TypeError for a value that is not valid, if all weights are 0, or for a teacher_dim without
        embed_dim.
        """
        modes = local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        super().__init__(*modes, pm_weight=pm_weight, **unknown)
        self.embed_dim = checked_width("embed_dim", embed_dim)
        self.contrastive_weight = checked_weight("contrastive_weight", contrastive_weight)
        self.relational_weight = checked_weight("relational_weight", relational_weight)
        self.interactive_weight = checked_weight("interactive_weight", interactive_weight)
        self.feature_weight = checked_weight("feature_weight", feature_weight)
        checks.check_choice("interactive", interactive, BY_NAME["interactive"].choices)
        checks.check_choice("divergence", divergence, DIVERGENCES)
        self.interactive, self.divergence = interactive, divergence
        self.teacher_dim = checked_width("teacher_dim", teacher_dim)
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
        projects = any(getattr(self, term.weight) for term in _TERMS if not term.sweeps)
        if projects and teacher_dim is not None and dim is not None and teacher_dim != dim:
            self.image_projection = nn.Parameter(torch.randn(teacher_dim, dim) * dim**-0.5)
            self.text_projection = nn.Parameter(torch.randn(teacher_dim, dim) * dim**-0.5)

    def extra_repr(self) -> str:
        """Returns the weights, interactive and divergence for `repr`."""
        weights = ", ".join(f"{term.weight}={getattr(self, term.weight)}" for term in _TERMS)
        return f"{weights}, interactive={self.interactive!r}, divergence={self.divergence!r}"

    def _weights(self) -> dict[str, float]:
        """Returns name -> weight of the terms with a weight above 0, as `terms` names them."""
        weights = {term.name: getattr(self, term.weight) for term in _TERMS}
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
        """Returns the weighted terms, each [] with its gradient, without those of weight 0.

        With output_dict they are a dict; the keys, in this order, are `contrastive_loss`,
        `distill_loss` (relational), `interactive_loss`, `feature_loss`, `pair_matching_loss`.

        dist_...: the teacher's features and scale, constants. ids: pairs with equal ids are not
        each other's negatives. A collective call if world_size > 1.
        """
        weights = self._weights()
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        pairs = image_features, text_features, logit_scale
        values = self._values(pairs, tuple(weights), ids=ids, teacher=teacher)
        losses = {BY_NAME[name].key: weight * values[name] for name, weight in weights.items()}
        return losses if output_dict else tuple(losses.values())

    def _computed(
        self,
        pairs: tuple[Tensor, Tensor, Tensor],
        terms: tuple[str, ...],
        teacher: Any,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Returns the terms of this rank's rows: those of similarity_loss, and those by methods."""
        image, text, scale = pairs
        self._check_width(image)
        weights = options["weights"]
        ids = options["ids"]
        swept = tuple(name for name in terms if BY_NAME[name].sweeps)
        values: dict[str, Tensor] = {}
        if swept:
            of_swept = dict(options)
            if weights is not None:
                of_swept["weights"] = {name: weights[name] for name in swept}
            of_teacher = None if TEACHER_TERMS.isdisjoint(swept) else teacher
            values = super()._computed(pairs, swept, of_teacher, of_swept)
        others = [term.name for term in TERMS if term.name in terms and not term.sweeps]
        if not others:
            return values
        why = inputs.why_teacher(others)
        teacher = inputs.checked_teacher(NAMES, image, text, teacher, why, needs_scale=False)
        student = self._in_teachers_width(image, text, teacher)
        # The terms share it, so that their gradients are summed in float32, and then clamped.
        wide = [widen(features) for features in student]
        for name in others:
            if name == "feature":
                value = self._feature(wide, teacher)
            else:
                value = self._interactive(student, scale, teacher, ids)
            if weights is not None:
                weighted = weights[name] * value
                values["loss"] = values["loss"] + weighted if "loss" in values else weighted
                value = value.detach()
            values[name] = value
        return values

    def _check_width(self, image: Tensor) -> None:
        """Raises ValueError unless image has embed_dim columns, or with `prefixes` at most so."""
        most = self.embed_dim
        width = image.shape[1]
        if most is None or width == most or (self.prefixes and width < most):
            return
        got = checks.shape_of(image)
        raise ValueError(f"image_features: expected the width embed_dim = {most}, got shape {got}")

    def _interactive(
        self, student: list[Tensor], scale: Tensor, teacher: list[Any], ids: Tensor | None
    ) -> Tensor:
        """Returns the interactive term []: own rows against the teacher's columns, gathered."""
        image, text = student
        dtype = image.dtype
        if self.image_projection is not None:
            image, text = (F.normalize(t, dim=-1).to(dtype) for t in student)
        of_image, of_text = (t.to(dtype) for t in teacher[:2])
        of_scale = teacher[2]
        if self.interactive == "kl" and of_scale is None:
            raise ValueError(
                "dist_logit_scale: expected a value, since interactive='kl' needs it, got None"
            )
        if ids is not None:
            ids = inputs.check_ids("ids", ids, len(image), "N", image.device)
        all_of_images, all_of_texts, all_ids = self._gathered(of_image, of_text, ids)
        by_image = by_text = None
        term = "contrastive"
        if self.interactive == "kl":
            term = "relational"
            by_image = of_image, all_of_texts, of_scale
            by_text = of_text, all_of_images, of_scale
        offset = self.rank * len(image)
        options = {"terms": (term,), "ids": ids, "text_ids": all_ids, "label_offset": offset}
        options["symmetric"] = False
        of_rows = self._swept(image, all_of_texts, scale, by_image, **options)[term]
        of_columns = self._swept(text, all_of_images, scale, by_text, **options)[term]
        return 0.5 * of_rows + 0.5 * of_columns

    def _feature(self, student: list[Tensor], teacher: list[Any]) -> Tensor:
        """Returns the feature term [], the mean of image and text."""
        image, text = student
        with no_autocast(image.device):
            image_distance = ops.feature_loss(image, teacher[0])
            text_distance = ops.feature_loss(text, teacher[1])
        return 0.5 * (image_distance + text_distance)

    def _in_teachers_width(self, image: Tensor, text: Tensor, teacher: list[Any]) -> list[Tensor]:
        """Returns image and text in the teacher's width, by the projections if there are any."""
        if self.image_projection is None:
            width: Any = image.shape[1]
            features = "a prefix of image_features" if self.prefixes else "image_features"
            weights = " or ".join(term.weight for term in _TERMS if not term.sweeps)
            expected = (
                f"{width} of {features}, without a projection (embed_dim, another teacher_dim, "
                f"and {weights} above 0 make one)"
            )
        else:
            width = self.teacher_dim
            expected = f"teacher_dim = {width}"
        if teacher[0].shape[1] != width:
            raise ValueError(
                f"dist_image_features: expected the width {expected}, got shape "
                f"{checks.shape_of(teacher[0])}"
            )
        if self.image_projection is None or self.text_projection is None:
            return [image, text]
        image_weight, text_weight = self._synchronised_parameters(
            self.image_projection, self.text_projection
        )
        return [_projected(image, image_weight), _projected(text, text_weight)]


def _projected(features: Tensor, weight: Tensor) -> Tensor:
    """Returns features [N, D] times the first D columns of weight, in float32 or float64."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with no_autocast(features.device):
        return F.linear(widen(features).to(dtype), weight[:, : features.shape[1]].to(dtype))
