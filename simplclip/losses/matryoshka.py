"""MatryoshkaLoss: any loss over features, summed over prefixes of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from simplclip.losses.base import SimilarityLoss, weight_of
from simplclip.losses.wikd import wide
from simplclip.ops import checks


class MatryoshkaLoss(nn.Module):
    r"""The weighted sum of a loss over prefixes of the features (Matryoshka representation
    learning).

        value = Σ_k weights_k · loss(normalise(image[:, :widths_k]), normalise(text[:, :widths_k]),
        ...)

    loss: any module whose first arguments are image and text features [N, D]; each term that it
    returns is summed. A hadamard plane and projections have the width D; a prefix uses their first
    columns. widths: ascending. weights: 0 or more, by default 1. What the loss does, also exchange
    between ranks and CoCaLoss's caption, is done once for each width.

    Source: Kusupati et al. 2022 (arXiv 2205.13147). memeff's MatryoshkaLoss has the same
    definition.
    """

    def __init__(
        self, loss: nn.Module, widths: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        checks.instance("loss", loss, nn.Module, "an nn.Module")
        self.loss, self.widths = loss, tuple(widths)
        self.weights = (1.0,) * len(self.widths) if weights is None else tuple(weights)
        if not self.widths or any(
            type(b) is not int or a >= b for a, b in zip((0, *self.widths), self.widths)
        ):
            raise ValueError(f"widths: expected ascending integers above 0, got {self.widths}")
        if sum(weight_of("weights", w) for w in self.weights) == 0 or len(self.weights) != len(
            self.widths
        ):
            raise ValueError(
                f"weights: expected {len(self.widths)}, one above 0, got {self.weights}"
            )
        if isinstance(loss, SimilarityLoss):
            loss.prefixes = True

    # [N, D], [N, D]
    def forward(
        self, image_features: Tensor, text_features: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what the wrapped loss returns, with each term summed over the widths. args,
        kwargs: its other arguments.
        """
        if image_features.shape[-1] < self.widths[-1]:
            raise ValueError(
                f"widths: expected at most the features' width, {image_features.shape[-1]}, got "
                f"{self.widths}"
            )
        total = None
        for width, weight in zip(self.widths, self.weights):
            if weight:
                units = (_unit_prefix(t, width) for t in (image_features, text_features))
                terms = tree_map(
                    lambda term, weight=weight: weight * term, self.loss(*units, *args, **kwargs)
                )
                total = terms if total is None else tree_map(torch.add, total, terms)
        return total


def _unit_prefix(features: Tensor, width: int) -> Tensor:
    """Returns the first columns [N, width], normalised in float32, or in float64 of float64."""
    prefix = wide(features[:, :width])
    return F.normalize(prefix.to(torch.promote_types(prefix.dtype, torch.float32)), dim=1).to(
        features.dtype
    )
