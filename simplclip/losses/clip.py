"""ClipPMLoss and its base PairLoss, which is also the base of ClipLoss and SigLipLoss in drop_in.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from simplclip.losses.base import SimilarityLoss, terms_of_sum

KEYS = {"sigmoid": "contrastive_loss"}  # open_clip's name


class PairLoss(SimilarityLoss):
    """Base class with the forward of a loss of one term, to which pair matching is added if pm_weight is not 0."""

    TERM = "contrastive"
    added_up = False  # True if the caller adds up the terms of the dict, so that the first may carry the gradient of the sum

    def extra_repr(self) -> str:
        names = ("pm_weight", "plane") if self.pm_weight else ()
        shown = {name: getattr(self, name) for name in names} | self.options
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

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
        """Returns the loss; with output_dict, a dict of its weighted terms, each with its own gradient.

        These are `contrastive_loss` and, with pm_weight, `pair_matching_loss`.

        ids: pairs with equal ids (several captions of an image, duplicates) are not each other's negatives, or are positives;
        see `positives`.
        """
        image, text = self._own_features(image_features, text_features)
        return self._of(image, text, logit_scale, logit_bias, output_dict, ids=ids)

    def _of(self, image, text, logit_scale, logit_bias=None, output_dict=False, *, ids=None) -> Any:
        weights = {self.TERM: 1.0} | ({"pair_matching": self.pm_weight} if self.pm_weight else {})
        tensors = {"logit_scale": logit_scale, "logit_bias": logit_bias, "ids": ids}
        if self.added_up or not output_dict:  # with weights, sigmoid and pair matching share a sweep
            values = self._terms(tuple(weights), image, text, weights=weights, **tensors)
            if not output_dict:
                return self._value(values["loss"])
            values = terms_of_sum(values, weights)
        else:
            values = self._terms(tuple(weights), image, text, **tensors)
            values = {term: weight * values[term] for term, weight in weights.items()}
        return {KEYS.get(term, f"{term}_loss"): self._value(value) for term, value in values.items()}


class ClipPMLoss(PairLoss):
    r"""Contrastive loss plus pair matching, a drop-in replacement of `open_clip.ClipLoss`.

        loss = ClipLoss(image, text) + pm_weight · ½ [mean_i softplus(−l_ii) + mean over negatives softplus(l_ij)]

    with the learned hyperplane l = p S + q (plane="scalar") or l_ij = w·(x_i ⊙ y_j) + q (plane="hadamard") over the
    similarity S of L2-normalised features; see `simplclip.ops.similarity_loss`, which never stores the N×N matrix. The
    hyperplane's parameters are `plane_weight` (p [], or w [D]) and `plane_bias` (q []); pass them to the optimizer. With
    pm_weight=0 the module has no parameters and equals ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss. cache_labels has no effect,
            since labels are an offset here. use_horovod is not supported with several ranks.
        pm_weight: weight of pair matching, 0 or more.
        plane: "scalar" or "hadamard"; hadamard needs embed_dim.
        embed_dim: D, for plane="hadamard".
        label_smoothing, decoupled, prior, margin, positives: as in ClipLoss; positives are those of pair matching too.

    Source: open_clip.loss.ClipLoss; arXiv 2411.14789 names pair matching; its form is this library's interpretation.
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
        label_smoothing: float = 0.0,
        decoupled: bool = False,
        prior: float | None = None,
        margin: float = 0.0,
        positives: str = "drop",
    ):
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod,
            pm_weight=pm_weight, plane=plane, embed_dim=embed_dim, label_smoothing=label_smoothing,
            decoupled=decoupled, prior=prior, margin=margin, positives=positives,
        )  # fmt: skip
