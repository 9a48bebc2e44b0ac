"""The losses by similarity_loss: their base, with the plane of pair matching, and ClipPMLoss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Never, overload

import torch
from torch import Tensor, nn

from simplclip.common.terms import BY_NAME, SWEPT
from simplclip.losses.base import NAMES, TEACHER, DistributedLoss, checked_weight
from simplclip.ops import checks
from simplclip.ops.modes import autocast
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.pairs import Pairs, Settings, Teacher, Values
from simplclip.ops.similarity.route import compute


def _teacher(values: Any, terms: tuple[str, ...]) -> Teacher | None:
    """Returns the Teacher of (image, text, scale), not checked; None if no term needs it."""
    if not inputs.needs_teacher(terms):
        return None
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        why = inputs.why_teacher(terms)
        raise ValueError(
            f"teacher: expected ({', '.join(TEACHER)}), since {why}, got {type(values).__name__}"
        )
    return Teacher(*values)


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
        record = _teacher(teacher, names)
        pairs = Pairs(image_features, text_features, logit_scale, logit_bias, ids, record)
        total, values = self._values(pairs, names, weights)
        assert total is not None
        return total, {name: weights[name] * value for name, value in values.items()}

    def _values(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None = None
    ) -> Values:
        """Returns terms of pairs as the loss got them, which it checks. Collective with ranks."""
        checks.check_features("image_features", pairs.image, "[N, D]")
        checks.check_features("text_features", pairs.text, "[N, D]")
        if self.world_size > 1:
            pairs = self._check_and_scale_with_all_ranks(pairs)
        pairs = inputs.checked(pairs, NAMES, terms, equal_rows=True)
        total, values = self._computed(pairs, terms, weights)
        if self.world_size > 1:
            values = {name: self._averaged_over_ranks(value) for name, value in values.items()}
            total = None if total is None else self._averaged_over_ranks(total)
        return Values(total, values)

    def _computed(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None
    ) -> Values:
        """Returns the terms of this rank's rows, of checked pairs, against all ranks' columns."""
        is_apart = self.world_size > 1 and self.local_loss and not self.gather_with_grad
        plane = None
        if "pair_matching" in terms:
            plane = self._plane(pairs.image)
        if not is_apart:
            group = self._group() if self.world_size > 1 else None
            return compute(pairs, self._settings(terms, weights, plane, group=group))

        # The directions are computed apart, each with this rank's rows and the columns of all
        # ranks, which are constants.
        image, text = autocast(pairs.image, pairs.text)  # before they travel
        pairs = replace(pairs, image=image, text=text)
        columns = self._gathered(pairs)
        rows = replace(pairs, text_ids=columns.ids, label_offset=self.rank * len(image))
        settings = self._settings(terms, weights, plane, symmetric=False)
        by_image = compute(rows.against(columns), settings)
        by_text = compute(rows.swapped().against(columns.swapped()), settings)
        terms_of_both = {
            name: 0.5 * (value + by_text.terms[name]) for name, value in by_image.terms.items()
        }
        if by_image.total is None or by_text.total is None:
            return Values(None, terms_of_both)
        return Values(0.5 * (by_image.total + by_text.total), terms_of_both)

    def _settings(
        self,
        terms: tuple[str, ...],
        weights: Mapping[str, float] | None = None,
        plane: tuple[Tensor, Tensor] | None = None,
        *,
        symmetric: bool = True,
        group: Any = None,
    ) -> Settings:
        """Returns checked settings of a call, with the attributes of this loss."""
        settings = Settings(
            terms,
            weights,
            plane,
            self.divergence,
            symmetric,
            group,
            self.scratch_bytes,
            self.store_bytes,
        )
        inputs.check_budgets(settings)
        return settings

    def _plane(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight and bias of the plane, checked."""
        plane: Any = None
        if self.plane_weight is not None:
            plane = self.plane_weight, self.plane_bias
            if self.world_size > 1:
                plane = self._synchronised_parameters(*plane)
        return inputs.checked_plane(plane, image)


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
        pairs = Pairs(image_features, text_features, logit_scale, logit_bias, ids)
        term = self.TERM
        if not self.pm_weight:
            value = self._values(pairs, (term,)).terms[term]
            return {BY_NAME[term].key: value} if output_dict else value
        weights = self._weights()
        if not output_dict:  # with weights, sigmoid and pair matching share a sweep
            total = self._values(pairs, tuple(weights), weights).total
            assert total is not None
            return total
        values = self._values(pairs, tuple(weights)).terms
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
