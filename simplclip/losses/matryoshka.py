"""MatryoshkaLoss: any loss over features, summed over prefixes of the features."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from simplclip.losses.base import SimilarityLoss, weight_of
from simplclip.losses.wikd import WIKDLoss, wide
from simplclip.ops import checks, distributed
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.registry import autocast


class MatryoshkaLoss(nn.Module):
    r"""The weighted sum of a loss over prefixes of the features (Matryoshka representation learning).

        value = Σ_k weights_k · loss(normalise(image[:, :widths_k]), normalise(text[:, :widths_k]), ...)

    so that the first widths_k features are an embedding of their own. It takes and returns what the wrapped loss does:

        loss = MatryoshkaLoss(ClipLoss(), widths=(64, 128, 256, 512))
        value = loss(image_features, text_features, logit_scale)

    Args:
        loss: a loss of simplclip.losses, or any module whose first arguments are image and text features [N, D], such as one
            of open_clip's. It returns a tensor, a tuple of terms, or a dict of terms.
        widths: ascending. Features after the last width get no gradient.
        weights: one of 0 or more for each width, by default 1 (a sum, not a mean). A width of weight 0 costs nothing.

    A hadamard plane and WIKDLoss's projections have the whole width D (embed_dim); a prefix uses their first columns. A
    teacher keeps its width. The interactive and feature terms of WIKDLoss compare features, so they need its projections
    (embed_dim and another teacher_dim). The caption term of CoCaLoss is computed once and counts once, without a weight.

    With world_size > 1, values and gradients are those of SimilarityLoss's table. A loss of this package exchanges features
    and their gradients once, at width D, and the teacher's features and ids once. Under torch.compile, with losses of other
    packages, and with a subclass that has its own forward, all are exchanged once for each width.

    Cost: Σ widths / D times the matrix products of the loss at width D. Other work is done once for each width.
    Memory: in addition copies of the prefixes, 2 N Σ widths elements in the features' dtype and as much for their gradients,
    and what the loss keeps for backward at each width.

    Source: Kusupati et al. 2022 (arXiv 2205.13147). memeff's MatryoshkaLoss has the same definition.
    """

    def __init__(self, loss: nn.Module, widths: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss: expected a loss, which is an nn.Module, got {type(loss).__name__}")
        widths = tuple(widths) if isinstance(widths, Iterable) else (widths,)
        if not widths or any(type(b) is not int or a >= b for a, b in zip((0, *widths), widths)):
            raise ValueError(f"widths: expected ascending integers above 0, got {widths}")
        weights = (1.0,) * len(widths) if weights is None else tuple(weights)
        if not any([weight_of("weights", weight) for weight in weights]) or len(weights) != len(widths):
            raise ValueError(f"weights: expected one for each of {len(widths)} widths, and one above 0, got {weights}")
        self.loss, self.widths, self.weights = loss, widths, weights
        # A loss of this package takes prefixes by `_of`, unless a subclass has a forward of its own.
        of_forward = next(vars(c) for c in type(loss).__mro__ if "forward" in vars(c))
        self.of_ours = isinstance(loss, SimilarityLoss) and "_of" in of_forward

    def extra_repr(self) -> str:
        return f"widths={self.widths}, weights={self.weights}"

    def forward(self, image_features: Tensor, text_features: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, D], [N, D]
        """Returns what the wrapped loss returns, with each term summed over the widths. args, kwargs: its other arguments."""
        for name, t in (("image_features", image_features), ("text_features", text_features)):
            checks.features(name, t, "[N, D]")
            if t.shape[1] < self.widths[-1]:
                raise ValueError(f"widths: expected at most the width of {name}, {t.shape[1]}, got {self.widths}")
        widths, weights = zip(*((width, weight) for width, weight in zip(self.widths, self.weights) if weight))
        loss: Any = self.loss
        both: Any = (image_features, text_features)
        once: Any = nullcontext()
        call, results = loss, []
        if caption := hasattr(loss, "caption_loss"):
            _, _, *named = inspect.signature(loss.forward).bind(*both, *args, **kwargs).arguments.items()
            args, kwargs = (), dict(named)
        if self.of_ours:
            call, both = loss._of, autocast(*loss._own_features(*both))
            if not isinstance(loss, WIKDLoss) or not loss.feature_weight:  # the feature term reads the teacher uncast
                # Casts the teacher's features as the loss would, but only once, not once for each width.
                to = lambda t: t.to(both[0].dtype) if t.dim() == 2 and t.is_floating_point() else t  # noqa: E731
                args, kwargs = tree_map_only(Tensor, to, (args, kwargs))
        prefixes = [_prefixes(features, widths) for features in both]
        if self.of_ours and loss.world_size > 1:
            once = distributed.gathered_rows([*zip(both, prefixes)], lambda rows: _prefixes(rows, widths), loss._group())
        with once:
            for image, text in zip(*prefixes):
                results.append(call(image, text, *args, **kwargs))
                if caption:  # one token only: the caption's loss of the other widths is not used
                    kwargs |= {name: kwargs[name][:1, :1] for name in ("logits", "labels")}
        total = tree_map(lambda *values: sum(weight * value for weight, value in zip(weights, values)), *results)
        if caption and isinstance(total, dict):
            return total | {"caption_loss": results[0]["caption_loss"]}
        return (total[0], results[0][1]) if caption else total


def _prefixes(features: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Returns normalised copies [N, w] of the features' first columns, one copy for each width w."""
    values = wide(features).to(accumulate_dtype(features.dtype))
    squares = [values[:, start:stop].square().sum(1) for start, stop in zip((0, *widths), widths)]
    inverse = torch.stack(squares, 1).cumsum(1).clamp(min=1e-24).rsqrt()  # as F.normalize, whose eps is 1e-12
    return [(values[:, :width] * inverse[:, k, None]).to(features.dtype) for k, width in enumerate(widths)]
