"""Loss modules with open_clip's signatures on top of the fused ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simplclip import checks, ops
from simplclip.ops.similarity_loss import NEGATIVES

PLANES = ("scalar", "hadamard")


class ClipPMLoss(nn.Module):
    r"""Contrastive loss plus pair matching, in the place of `open_clip.ClipLoss`.

        loss = ClipLoss(image, text) + pm_weight · ½ [mean_i softplus(−l_ii) + mean over negatives softplus(l_ij)]

    with the learned hyperplane l = p S + q (plane="scalar") or l_ij = w·(x_i ⊙ y_j) + q (plane="hadamard") over the
    similarity S of L2-normalised features; see `simplclip.ops.similarity_loss`, which never stores the N×N matrix (memory
    there). The plane is this module's parameters: `plane_weight` (p [], or w [D]) and `plane_bias` (q []); give them to the
    optimizer. pm_weight=0 has no parameters and is exactly ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in open_clip.ClipLoss. (Labels are
            an offset here, so that there is nothing to cache.)
        pm_weight: weight of pair matching, 0 or more.
        plane: "scalar" or "hadamard"; hadamard needs embed_dim.
        negatives: "all", "shift" (one negative per row, drawn anew at each call from torch's default generator) or "hard".
        embed_dim: D, for plane="hadamard".

    Source: open_clip.loss.ClipLoss; arXiv 2411.14789 names pair matching, its form here is this library's reading.
    """

    # l = p S + q starts between the cosines of unmatched (about 0) and matched (about 0.3 and more) pairs.
    INITIAL_WEIGHT, INITIAL_BIAS = 10.0, -2.0

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
        negatives: str = "all",
        embed_dim: int | None = None,
    ):
        super().__init__()
        if not pm_weight >= 0:
            raise ValueError(f"pm_weight: expected a weight of 0 or more, got {pm_weight!r}")
        checks.choice("plane", plane, PLANES)
        checks.choice("negatives", negatives, NEGATIVES)
        if plane == "hadamard" and pm_weight and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the features for plane='hadamard', got None")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.pm_weight = pm_weight
        self.plane = plane
        self.negatives = negatives
        if pm_weight:
            shape = (embed_dim,) if plane == "hadamard" else ()
            self.plane_weight = nn.Parameter(torch.full(shape, self.INITIAL_WEIGHT))
            self.plane_bias = nn.Parameter(torch.tensor(self.INITIAL_BIAS))

    def extra_repr(self) -> str:
        return f"pm_weight={self.pm_weight}, plane={self.plane!r}, negatives={self.negatives!r}"

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
        """The loss; with output_dict its weighted terms, `contrastive_loss` and (with pm_weight) `pair_matching_loss`.

        ids: pairs with equal ids are not each other's negatives (several captions of an image, duplicates).
        """
        if self.world_size == 1:
            values = self._terms(image_features, text_features, logit_scale, logit_bias, ids, ids)
        else:
            from open_clip.loss import gather_features

            all_image, all_text = gather_features(
                image_features, text_features, self.local_loss, self.gather_with_grad, self.rank, self.world_size,
                self.use_horovod,
            )  # fmt: skip
            all_ids = None if ids is None else _gather_ids(ids, self.world_size)
            if self.local_loss:
                offset = self.rank * image_features.shape[0]
                rest = (logit_scale, logit_bias, ids, all_ids, offset, False)
                by_image = self._terms(image_features, all_text, *rest)
                by_text = self._terms(text_features, all_image, *rest)
                values = {name: 0.5 * (by_image[name] + by_text[name]) for name in by_image}
            else:
                values = self._terms(all_image, all_text, logit_scale, logit_bias, all_ids, all_ids)
        losses = {"contrastive_loss": values["contrastive"]}
        if self.pm_weight:
            losses["pair_matching_loss"] = self.pm_weight * values["pair_matching"]
        return losses if output_dict else sum(losses.values())

    def _terms(self, image, text, logit_scale, logit_bias, ids, text_ids, label_offset=0, symmetric=True):
        matching = {}
        if self.pm_weight:
            matching = {"plane": (self.plane_weight, self.plane_bias), "negatives": self.negatives}
            if self.negatives == "shift":
                matching["shift"] = torch.randint(1, max(text.shape[0], 2), (), device=image.device)
        return ops.similarity_loss(
            image,
            text,
            logit_scale,
            logit_bias=logit_bias,
            terms=("contrastive", "pair_matching") if self.pm_weight else ("contrastive",),
            ids=ids,
            text_ids=text_ids,
            label_offset=label_offset,
            symmetric=symmetric,
            **matching,
        )


def _gather_ids(ids: Tensor, world_size: int) -> Tensor:
    gathered = [torch.empty_like(ids) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, ids)
    return torch.cat(gathered)
