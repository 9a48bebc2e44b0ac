"""MatryoshkaLoss: any loss over features, summed over prefixes of the features."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from simplclip.losses.base import SimilarityLoss, weight_of
from simplclip.losses.wikd import WIKDLoss, wide
from simplclip.ops import checks, distributed
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import autocast

_EPS = 1e-12  # that of F.normalize
_OF_CAPTION = ("logits", "labels")  # arguments of CoCaLoss


class MatryoshkaLoss(nn.Module):
    r"""The weighted sum of a loss over prefixes of the features (Matryoshka representation learning).

        value = Σ_k weights_k · loss(normalise(image[:, :widths_k]), normalise(text[:, :widths_k]), ...)

    so that the first widths_k features are an embedding of their own. It takes the wrapped loss's arguments and returns what
    that returns, each of its terms summed:

        loss = MatryoshkaLoss(ClipLoss(), widths=(64, 128, 256, 512))
        value = loss(image_features, text_features, logit_scale)

    Args:
        loss: a loss of simplclip.losses, or any module whose first arguments are image and text features [N, D], such as one
            of open_clip's. It returns a tensor, a tuple of terms, or a dict of terms.
        widths: ascending. Features after the last one get no gradient.
        weights: one of 0 or more for each width, by default 1: the value is a sum, not a mean. A width of weight 0 costs
            nothing.

    What does not depend on the width is computed once: the checks of the features, the squared norms of all prefixes (in one
    pass over the features), and the caption term of CoCaLoss, which counts once and without a weight. The weights of a
    hadamard plane and the projections of WIKDLoss have the whole width D (embed_dim); a prefix uses their first columns. A
    teacher keeps its own width: each prefix learns from the same logits of the teacher. The interactive and feature terms of
    WIKDLoss compare features, so they need its projections (embed_dim and another teacher_dim).

    With world_size > 1, values and gradients are those of SimilarityLoss's table. A loss of this package exchanges the
    features, and their gradients, once at width D, and the teacher's features and ids once; under torch.compile, and with
    losses of other packages, they are exchanged once for each width.

    Cost: Σ widths / D times the matrix products of the loss at width D; what does not depend on D (the exponentials, the
    teacher's products) once for each width. Memory: in addition copies of the prefixes, 2 N Σ widths elements in the
    features' dtype and as much for their gradients; with several ranks also of the gathered features that the loss reads. The
    prefixes are swept one after the other; each keeps for backward what the loss keeps at its width.

    Source: Kusupati et al. 2022 (arXiv 2205.13147). memeff's MatryoshkaLoss has the same definition.
    """

    def __init__(self, loss: nn.Module, widths: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss: expected a loss, which is an nn.Module, got {type(loss).__name__}")
        widths = tuple(widths)
        whole = all(isinstance(width, int) and not isinstance(width, bool) for width in widths)
        if not widths or not whole or any(a >= b for a, b in zip((0, *widths), widths)):
            raise ValueError(f"widths: expected ascending integers above 0, got {widths}")
        weights = (1.0,) * len(widths) if weights is None else tuple(weights)
        if len(weights) != len(widths):
            raise ValueError(f"weights: expected one for each of {len(widths)} widths, got {len(weights)}")
        if not any([weight_of("weights", weight) for weight in weights]):
            raise ValueError(f"weights: expected one above 0, got {weights}")
        if isinstance(loss, WIKDLoss) and (loss.interactive_weight or loss.feature_weight):
            projections = loss.image_projections or [torch.empty(0)]
            if not all(p.numel() for p in projections):
                raise ValueError(
                    "loss: expected a WIKDLoss that projects to each teacher's width (embed_dim and another teacher_dim) for "
                    "its interactive and feature terms, got one without projections"
                )
        self.loss, self.widths, self.weights = loss, widths, weights

    def extra_repr(self) -> str:
        return f"widths={self.widths}, weights={self.weights}"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """Returns what the wrapped loss returns, with each term summed over the widths. args, kwargs: its other arguments.

        Raises:
            TypeError, ValueError: an argument is not valid, or the features have fewer columns than the last width.
        """
        image, text = image_features, text_features
        for name, t in (("image_features", image), ("text_features", text)):
            checks.features(name, t, "[N, D]")
            if t.shape[1] < self.widths[-1]:
                raise ValueError(f"widths: expected at most the width of {name}, {t.shape[1]}, got {self.widths}")
        widths, weights = zip(*((width, weight) for width, weight in zip(self.widths, self.weights) if weight))
        loss, results = self.loss, []
        caption = hasattr(loss, "caption_loss")
        with ExitStack() as stack:
            if isinstance(loss, SimilarityLoss):
                image, text = autocast(*loss._own_features(image, text))
                stack.enter_context(loss._of_prefixes())
                if not isinstance(loss, WIKDLoss) or not loss.feature_weight:  # which reads the teacher as it is stored
                    args, kwargs = _in_dtype(image.dtype, args, kwargs)
            images, texts = _prefixes(image, widths), _prefixes(text, widths)
            if isinstance(loss, SimilarityLoss) and loss.world_size > 1:
                both = [(image, images), (text, texts)]
                stack.enter_context(distributed.gathered_rows(both, lambda rows: _prefixes(rows, widths), loss._group()))
            for index, width in enumerate(widths):
                results.append(self._of_width(width, (images[index], texts[index], *args), kwargs))
                if caption and index == 0:
                    args, kwargs = _short_caption(loss, args, kwargs)
        first = results[0]
        terms = [[*(r.values() if isinstance(r, dict) else r if isinstance(r, tuple) else (r,))] for r in results]
        totals = [sum(weight * value for weight, value in zip(weights, values)) for values in zip(*terms)]
        if caption:
            totals[-1] = terms[0][-1]
        if isinstance(first, dict):
            return dict(zip(first, totals))
        return tuple(totals) if isinstance(first, tuple) else totals[0]

    def _of_width(self, width: int, args: tuple, kwargs: dict[str, Any]):
        of_prefix = self.loss._parameters_of_prefix(width) if isinstance(self.loss, SimilarityLoss) else {}
        if of_prefix:
            return torch.func.functional_call(self.loss, of_prefix, args, kwargs)
        return self.loss(*args, **kwargs)


def _prefixes(features: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """[N, D] -> normalised copies [N, w] for each of the widths."""
    values = wide(features).to(accumulate_dtype(features.dtype))
    squares, start = [], 0
    for width in widths:
        squares.append(values[:, start:width].square().sum(1))
        start = width
    inverse = torch.stack(squares, 1).cumsum(1).clamp(min=_EPS**2).rsqrt()
    return [(values[:, :width] * inverse[:, k, None]).to(features.dtype) for k, width in enumerate(widths)]


def _in_dtype(dtype: torch.dtype, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Casts a teacher's features to the dtype that the losses cast them to, once instead of once a width."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dim() == 2 and t.is_floating_point() else t, (args, kwargs))


def _short_caption(loss: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Leaves one token of the caption, whose loss is computed with the first width and not read with the others."""
    names = list(inspect.signature(loss.forward).parameters)[2:]
    args = tuple(t[:1, :1] if name in _OF_CAPTION else t for name, t in zip(names, args))
    return args, {name: t[:1, :1] if name in _OF_CAPTION else t for name, t in kwargs.items()}
