"""ClipPMLoss, and PairLoss: its base, and that of ClipLoss and SigLipLoss in drop_in.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Never, overload

from torch import Tensor

from simplclip.losses.base import Pairs, SimilarityLoss


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
        """Returns pm_weight and plane for `repr`; an empty string without pair matching."""
        return f"pm_weight={self.pm_weight}, plane={self.plane!r}" if self.pm_weight else ""

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
        weight = self.pm_weight
        if not weight:
            value = self._values(pairs, (term,))[term]
            return {"contrastive_loss": value} if output_dict else value
        terms = (term, "pair_matching")
        if not output_dict:  # with weights, sigmoid and pair matching share a sweep
            return self._values(pairs, terms, {term: 1.0, "pair_matching": weight})["loss"]
        values = self._values(pairs, terms)
        return {
            "contrastive_loss": values[term],
            "pair_matching_loss": weight * values["pair_matching"],
        }


class ClipPMLoss(PairLoss):
    r"""Contrastive loss plus pair matching, a drop-in replacement of `open_clip.ClipLoss`.

        loss = ClipLoss(image, text)
             + pm_weight · ½ [mean_i softplus(−l_ii) + mean over negatives softplus(l_ij)]

    with the learned hyperplane l = p S + q (plane="scalar") or l_ij = w·(x_i ⊙ y_j) + q
    (plane="hadamard") over the similarity S of L2-normalised features; see
    `simplclip.ops.similarity_loss`, which never stores the N×N matrix. The hyperplane's parameters
    are `plane_weight` (p [], or w [D]) and `plane_bias` (q []); pass them to the optimizer. With
    pm_weight=0 the module has no parameters and equals ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss.
            cache_labels has no effect, since labels are an offset here. use_horovod is not
            supported with several ranks.
        pm_weight: weight of pair matching, 0 or more.
        plane: "scalar" or "hadamard"; hadamard needs embed_dim.
        embed_dim: D, for plane="hadamard".

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
        plane: str = "scalar",
        embed_dim: int | None = None,
        **unknown: Never,
    ) -> None:
        """Stores the settings and makes the plane's parameters, see `SimilarityLoss`.

        Pair matching has weight 1 by default. Raises as `SimilarityLoss`.
        """
        modes = local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        super().__init__(*modes, pm_weight=pm_weight, plane=plane, embed_dim=embed_dim, **unknown)
