"""MatryoshkaLoss: any loss over features, summed over prefixes of the features."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from simplclip.losses.base import checked_weight
from simplclip.losses.widen import widen
from simplclip.losses.wikd import WIKDLoss
from simplclip.ops import checks


class MatryoshkaLoss(nn.Module):
    r"""Matryoshka representation learning: the sum of a loss over prefixes of the features.

        value = Σ_k weights_k · loss(prefix_k(image), prefix_k(text), ...)
        prefix_k(x) = normalise(x[:, :widths_k])

    loss: any module whose first arguments are image and text features [N, D]; each term that it
    returns is summed. Projections have the width D; a prefix uses their first columns. widths:
    ascending. weights: 0 or more, by default 1. What the loss does, also exchange between ranks, is
    done once for each width. A term that reads no features, as CoCaLoss's caption, is summed over
    the widths too: its weight to the other terms is that without prefixes.

    Source: Kusupati et al. 2022 (arXiv 2205.13147). memeff's MatryoshkaLoss has the same
    definition.
    """

    def __init__(
        self, loss: nn.Module, widths: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        """Stores the loss with the widths and their weights; weights=None means 1 each.

        Each WIKDLoss in `loss` is changed: its `prefixes` becomes True, so that it takes
        features narrower than its embed_dim. Raises TypeError for a loss that is no module,
        ValueError for widths that are not ascending integers above 0, or weights that are negative,
        all 0 or of another number.
        """
        super().__init__()
        checks.check_instance("loss", loss, nn.Module, "an nn.Module")
        self.loss = loss
        self.widths = tuple(checks.sequence("widths", widths, "ascending integers above 0"))
        _check_widths(self.widths)
        if weights is None:
            weights = (1.0,) * len(self.widths)
        self.weights = tuple(checks.sequence("weights", weights, "a number for each width"))
        total = sum(checked_weight("weights", weight) for weight in self.weights)
        count = len(self.widths)
        if total == 0 or len(self.weights) != count:
            raise ValueError(f"weights: expected {count}, one above 0, got {self.weights}")
        for module in loss.modules():  # torch.compile wraps a loss in a module
            if isinstance(module, WIKDLoss):
                module.prefixes = True

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Returns what the wrapped loss returns, each term the weighted sum over the widths.

        args, kwargs: its other arguments. Each width with a weight above 0 calls the wrapped loss
        once. Raises ValueError if the features are narrower than the largest width, TypeError if
        the loss returns anything but tensors and numbers.
        """
        checks.check_features("image_features", image_features, "[N, D]")
        checks.check_features("text_features", text_features, "[N, D]")
        if image_features.shape[-1] < self.widths[-1]:
            raise ValueError(
                f"widths: expected at most the features' width, {image_features.shape[-1]}, got "
                f"{self.widths}"
            )
        total = None
        for width, weight in zip(self.widths, self.weights):
            if not weight:
                continue
            image = _unit_prefix(image_features, width)
            text = _unit_prefix(text_features, width)
            terms = self.loss(image, text, *args, **kwargs)
            terms = tree_map(partial(_weighted, weight), terms)
            total = terms if total is None else tree_map(operator.add, total, terms)
        return total


def _weighted(weight: float, term: Any) -> Any:
    """Returns a term times its weight; raises TypeError for what is no tensor and no number."""
    if not isinstance(term, (Tensor, float, int)):
        got = type(term).__name__
        raise TypeError(f"loss: expected a module that returns tensors and numbers, got {got}")
    return weight * term


def _check_widths(widths: tuple[int, ...]) -> None:
    """Raises ValueError unless the widths are ascending integers above 0, at least one."""
    integers = bool(widths) and all(type(width) is int for width in widths)
    if not integers or widths[0] < 1 or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths: expected ascending integers above 0, got {widths}")


def _unit_prefix(features: Tensor, width: int) -> Tensor:
    """Returns the first columns [N, width], normalised in float32 or float64, in their dtype."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    prefix = widen(features[:, :width]).to(dtype)
    return F.normalize(prefix, dim=1).to(features.dtype)
