"""The losses by similarity_loss: their base, with the plane of pair matching, and ClipPMLoss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Never, overload

import torch
from torch import Tensor, nn

from simplclip import ops
from simplclip.common.terms import BY_NAME, PLANE_TERMS, SWEPT, TEACHER_TERMS
from simplclip.losses.base import NAMES, TEACHER, DistributedLoss, checked_weight
from simplclip.ops import checks
from simplclip.ops.modes import autocast
from simplclip.ops.similarity import inputs


class SimilarityLoss(DistributedLoss):
    """Base class of the losses by ops.similarity_loss, with the plane of pair matching."""

    # l = p S + q is 0 at S = 0.2 at first, between the cosines of unmatched (about 0) and matched
    # (about 0.3 and more) pairs.
    INITIAL_WEIGHT, INITIAL_BIAS = 10.0, -2.0

    NAMES: tuple[str, ...] = SWEPT  # terms that the loss has
    # passed to similarity_loss, as is store_bytes; may be set on an instance
    scratch_bytes: int | None = None
    store_bytes: int | None = None
    divergence = "kl"  # of the relational term

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        pm_weight: float = 0.0,
        **unknown: Never,
    ) -> None:
        """Stores the settings and, with pm_weight above 0, makes the plane's parameters.

        pm_weight: weight of pair matching; at 0 plane_weight and plane_bias are None, else [].
        Other arguments as in `DistributedLoss`, also the errors; ValueError or TypeError for a
        value that is not valid.
        """
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **unknown
        )
        self.pm_weight = checked_weight("pm_weight", pm_weight)
        self.plane_weight = self.plane_bias = None
        if pm_weight:
            self.plane_weight = nn.Parameter(torch.tensor(self.INITIAL_WEIGHT))
            self.plane_bias = nn.Parameter(torch.tensor(self.INITIAL_BIAS))

    def terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        *,
        weights: Mapping[str, float],
        logit_bias: Tensor | None = None,  # []
        ids: Tensor | None = None,  # [N] int64
        teacher: tuple[Tensor, Tensor, Tensor] | None = None,  # [N, D̂], [N, D̂], []
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum [] of the weighted terms, and a dict of them without gradients.

        weights: name -> weight, for the terms to compute; the weights that the constructor got do
        not count here. The names are those of similarity_loss, pair matching only if the loss has a
        plane (pm_weight above 0), and of WIKDLoss those of its further terms. ids: pairs with equal
        ids are not each other's negatives. teacher: (image, text, scale), which the terms of
        distillation need. The values of the dict are weighted. A collective call if
        world_size > 1. Raises ValueError for no weights, and for a name or value that is not valid.
        """
        checks.check_instance("weights", weights, Mapping, "a mapping of terms to numbers")
        if not weights:
            raise ValueError("weights: expected a weight of at least one term, got none")
        names = inputs.checked_terms(tuple(weights), self.NAMES)
        weights = inputs.check_weights(weights, names)
        if TEACHER_TERMS.isdisjoint(names):
            teacher = None
        elif not isinstance(teacher, (tuple, list)) or len(teacher) != 3:
            raise ValueError(
                f"teacher: expected ({', '.join(TEACHER)}), since {inputs.why_teacher(names)}, "
                f"got {type(teacher).__name__}"
            )
        pairs = image_features, text_features, logit_scale
        values = self._values(
            pairs, names, weights, logit_bias=logit_bias, ids=ids, teacher=teacher
        )
        total = values.pop("loss")
        return total, {name: weights[name] * value for name, value in values.items()}

    def _values(
        self,
        pairs: tuple[Tensor, Tensor, Tensor],  # features of images and texts, and the scale
        terms: tuple[str, ...],
        weights: Mapping[str, float] | None = None,
        *,
        ids: Tensor | None = None,
        teacher: Any = None,  # None, or the teacher's pairs
        logit_bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns what similarity_loss does, of pairs as the loss got them. Collective with ranks.

        Also the terms that only the loss has, and these in the sum with weights.
        """
        image, text, scale = pairs
        are_tensors = isinstance(image, Tensor) and isinstance(text, Tensor)
        if self.world_size > 1 or not are_tensors or text.shape != image.shape:
            checks.check_features("image_features", image, "[N, D]")
            checks.check_features("text_features", text, "[N, D]")
            if self.world_size > 1:
                of_teacher = (None, None) if teacher is None else teacher[:2]
                image, text = self._scaled_for_ranks(image, text, *of_teacher, ids)
            if text.shape[0] != image.shape[0]:
                inputs.check_features(NAMES, image, text, equal_rows=True)
        options = {"weights": weights, "ids": ids, "logit_bias": logit_bias}
        values = self._computed((image, text, scale), terms, teacher, options)
        if self.world_size > 1:
            values = {name: self._averaged_over_ranks(value) for name, value in values.items()}
        return values

    def _computed(
        self,
        pairs: tuple[Tensor, Tensor, Tensor],
        terms: tuple[str, ...],
        teacher: Any,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Returns the terms of this rank's rows against all ranks' columns.

        options: `weights`, `ids` and `logit_bias` of similarity_loss.
        """
        image, text, scale = pairs
        if not PLANE_TERMS.isdisjoint(terms):
            options["plane"] = self._plane()
        if self.world_size <= 1 or not self.local_loss or self.gather_with_grad:
            if self.world_size > 1:
                options["group"] = self._group()
            return self._swept(image, text, scale, teacher, terms=terms, **options)

        # The directions are computed apart, each with this rank's rows and the columns of all
        # ranks, which are constants.
        image, text = autocast(image, text)  # before they travel
        inputs.check_features(NAMES, image, text)
        ids = options["ids"]
        if ids is not None:
            ids = inputs.check_ids("ids", ids, len(image), "N", image.device)
        by_image = by_text = None
        all_images, all_texts, all_ids = self._gathered(image, text, ids)
        if teacher is not None:
            why = inputs.why_teacher(terms)
            of_image, of_text, of_scale = inputs.checked_teacher(NAMES, image, text, teacher, why)
            all_of_images, all_of_texts = self._gathered(of_image, of_text)
            by_image = of_image, all_of_texts, of_scale
            by_text = of_text, all_of_images, of_scale
        offset = self.rank * len(image)
        options |= {"terms": terms, "text_ids": all_ids, "label_offset": offset}
        of_rows = self._swept(image, all_texts, scale, by_image, symmetric=False, **options)
        of_columns = self._swept(text, all_images, scale, by_text, symmetric=False, **options)
        return {name: 0.5 * (value + of_columns[name]) for name, value in of_rows.items()}

    def _swept(
        self, image: Tensor, text: Tensor, scale: Tensor, teacher: Any, **options: Any
    ) -> dict[str, Tensor]:
        """Returns what similarity_loss does, with the attributes of this loss."""
        if teacher is not None:
            options |= zip(("teacher_image", "teacher_text", "teacher_scale"), teacher)
        return ops.similarity_loss(
            image,
            text,
            scale,
            divergence=self.divergence,
            scratch_bytes=self.scratch_bytes,
            store_bytes=self.store_bytes,
            names=NAMES,
            **options,
        )

    def _plane(self) -> tuple[Tensor, ...] | None:
        """Returns weight and bias of the plane; None if the loss has none."""
        if self.plane_weight is None or self.plane_bias is None:
            return None
        return self._synchronised_parameters(self.plane_weight, self.plane_bias)


class PairLoss(SimilarityLoss):
    """Base class of a loss with one term, to which pair matching is added by pm_weight above 0."""

    TERM = "contrastive"

    if TYPE_CHECKING:  # nn.Module's takes and returns anything

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor,
            logit_bias: Tensor | None = None,
            output_dict: Literal[False] = False,
            *,
            ids: Tensor | None = None,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor,
            logit_bias: Tensor | None = None,
            output_dict: bool = ...,
            *,
            ids: Tensor | None = None,
        ) -> Any: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def extra_repr(self) -> str:
        """Returns pm_weight for `repr`; an empty string without pair matching."""
        return f"pm_weight={self.pm_weight}" if self.pm_weight else ""

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None = None,  # []
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,  # [N] int64
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss; with output_dict, its weighted terms, each with its own gradient.

        The keys are `contrastive_loss`, open_clip's name for the sigmoid term too, and, with
        pm_weight, `pair_matching_loss`.

        ids: pairs with equal ids (several captions of an image, duplicates) are not each other's
        negatives.
        """
        pairs = image_features, text_features, logit_scale
        given: dict[str, Any] = {"logit_bias": logit_bias, "ids": ids}
        term = self.TERM
        if not self.pm_weight:
            value = self._values(pairs, (term,), **given)[term]
            return {BY_NAME[term].key: value} if output_dict else value
        weights = self._weights()
        if not output_dict:  # with weights, sigmoid and pair matching share a sweep
            return self._values(pairs, tuple(weights), weights, **given)["loss"]
        values = self._values(pairs, tuple(weights), **given)
        losses = {BY_NAME[name].key: weights[name] * value for name, value in values.items()}
        return losses | {BY_NAME[term].key: values[term]}  # of weight 1

    def _weights(self) -> dict[str, float]:
        """Returns the weights of the terms by name, those of pair matching only above 0."""
        if not self.pm_weight:
            return {self.TERM: 1.0}
        return {self.TERM: 1.0, "pair_matching": self.pm_weight}


class ClipPMLoss(PairLoss):
    r"""Contrastive loss plus pair matching, a drop-in replacement of `open_clip.ClipLoss`.

        loss = ClipLoss(image, text)
             + pm_weight · ½ [mean_i softplus(−l_ii) + mean over negatives softplus(l_ij)]

    with the learned hyperplane l = p S + q over the similarity S of L2-normalised features; see
    `simplclip.ops.similarity_loss`, which never stores the N×N matrix. The hyperplane's parameters
    are `plane_weight` (p []) and `plane_bias` (q []); pass them to the optimizer. With pm_weight=0
    the module has no parameters and equals ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss.
            cache_labels has no effect, since labels are an offset here. use_horovod is not
            supported with several ranks.
        pm_weight: weight of pair matching, 0 or more.

    Source: open_clip.loss.ClipLoss; arXiv 2411.14789 names pair matching; its form is this
    library's interpretation.
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
        pm_weight: float = 1.0,
        **unknown: Never,
    ) -> None:
        """Stores the settings and makes the plane's parameters, see `SimilarityLoss`.

        Pair matching has weight 1 by default. Raises as `SimilarityLoss`.
        """
        modes = local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        super().__init__(*modes, pm_weight=pm_weight, **unknown)
