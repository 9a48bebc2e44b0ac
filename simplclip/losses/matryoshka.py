"""MatryoshkaLoss: any loss over features, summed over prefixes of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from simplclip.losses.base import SimilarityLoss, weight_of
from simplclip.losses.wikd import wide
from simplclip.ops.calls import accumulate_dtype


class MatryoshkaLoss(nn.Module):
    r"""The weighted sum of a loss over prefixes of the features (Matryoshka representation learning).

        value = Σ_k weights_k · loss(normalise(image[:, :widths_k]), normalise(text[:, :widths_k]), ...)

    loss: any module whose first arguments are image and text features [N, D]. It returns a tensor, a tuple or a dict of
    terms, and each term is summed. A hadamard plane and projections have the width D; a prefix uses their first columns.
    widths: ascending. weights: one of 0 or more for each width, by default 1. Everything that the loss does, exchange between
    ranks and CoCaLoss's caption included, is done once for each width of a weight above 0.

    Source: Kusupati et al. 2022 (arXiv 2205.13147). memeff's MatryoshkaLoss has the same definition.
    """

    def __init__(self, loss: nn.Module, widths: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        self.loss, self.widths = loss, tuple(widths)
        self.weights = (1.0,) * len(self.widths) if weights is None else tuple(weights)
        if not self.widths or any(type(b) is not int or a >= b for a, b in zip((0, *self.widths), self.widths)):
            raise ValueError(f"widths: expected ascending integers above 0, got {self.widths}")
        if not any([weight_of("weights", w) for w in self.weights]) or len(self.weights) != len(self.widths):
            raise ValueError(f"weights: expected one for each of {len(self.widths)} widths, one above 0, got {self.weights}")
        if isinstance(loss, SimilarityLoss):
            loss.prefixes = True

    def extra_repr(self) -> str:
        return f"widths={self.widths}, weights={self.weights}"

    def forward(self, image_features: Tensor, text_features: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, D], [N, D]
        """Returns what the wrapped loss returns, with each term summed over the widths. args, kwargs: its other arguments."""
        if image_features.shape[-1] < self.widths[-1]:
            raise ValueError(f"widths: expected at most the features' width, {image_features.shape[-1]}, got {self.widths}")
        results = []
        for width, weight in zip(self.widths, self.weights):
            if weight:
                prefixes = (wide(t[:, :width]).to(accumulate_dtype(t.dtype)) for t in (image_features, text_features))
                units = (F.normalize(prefix, dim=1).to(image_features.dtype) for prefix in prefixes)
                terms = self.loss(*units, *args, **kwargs)
                results.append(tree_map(lambda term, weight=weight: weight * term, terms))
        return tree_map(lambda *terms: sum(terms), *results)
