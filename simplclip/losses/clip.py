"""ClipPMLoss: the contrastive loss and pair matching."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from simplclip.losses.base import SimilarityLoss


class ClipPMLoss(SimilarityLoss):
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

    Source: open_clip.loss.ClipLoss; arXiv 2411.14789 names pair matching; its form is this library's interpretation.
    """

    def extra_repr(self) -> str:
        return f"pm_weight={self.pm_weight}, plane={self.plane!r}"

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
        """Returns the loss; with output_dict, a dict of its weighted terms.

        These are `contrastive_loss` and, with pm_weight, `pair_matching_loss`.

        ids: pairs with equal ids are not each other's negatives (several captions of an image, duplicates).
        """
        terms = ("contrastive", "pair_matching") if self.pm_weight else ("contrastive",)
        image, text = self._own_features(image_features, text_features)
        values = self._terms(terms, image, text, logit_scale=logit_scale, logit_bias=logit_bias, ids=ids)
        losses: dict[str, Any] = {"contrastive_loss": self._value(values["contrastive"])}
        if self.pm_weight:
            losses["pair_matching_loss"] = self.pm_weight * self._value(values["pair_matching"])
        return losses if output_dict else sum(losses.values())
