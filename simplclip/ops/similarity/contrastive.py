"""The contrastive term with its options, in plain torch, from statistics of rows and columns and from sums over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall
from simplclip.ops.similarity.positives import Groups
from simplclip.ops.similarity.terms import cross_entropy


@dataclass
class Contrastive:
    """Options of the contrastive term; see simplclip.ops.similarity_loss."""

    label_smoothing: float = 0.0
    decoupled: bool = False
    prior: Tensor | float | None = None  # [] or [N], of the debiased loss
    margin: float = 0.0
    positives: str = "drop"


def _debiased(lse: Tensor, positive: Tensor, negatives: Tensor, prior: Tensor | float, scale: Tensor) -> Tensor:  # [N] each
    """log(n g), g = max((ē − τ e^{z⁺}) / (1 − τ), e^{−s}): n negatives, the mean ē of their e^z, the prior τ."""
    number = negatives.clamp(min=1)
    top = torch.maximum(lse, positive).detach()  # so that nothing overflows
    mean, floor = (lse - top).exp() / number, (-scale - top).exp()
    corrected = (mean - prior * (positive - top).exp()) / (1 - prior)
    return torch.where(negatives > 0, top + (number * torch.maximum(corrected, floor)).log(), -torch.inf)


def contrastive(
    call: SimilarityCall,
    options: Contrastive,
    groups: Groups,
    rows: Tensor,  # [12, N] RowStat
    columns: Tensor | None,  # [6, N] ColumnStat of the columns of the pairs; None: the row direction only
) -> Tensor:  # []
    """The mean over rows and columns of D − Σ_j t_j z_j: D the log of the denominator, t the targets, z the logits."""
    positive = call.scale * rows[RowStat.DIAGONAL_STUDENT] - options.margin
    several = bool(options.label_smoothing) or options.positives != "drop"  # targets are more than the pair
    dropped = options.positives == "drop" or options.decoupled  # from the softmax: the pairs with equal ids

    def side(lse: Tensor, negatives: Tensor) -> Tensor:
        if options.prior is not None:
            lse = _debiased(lse, positive, negatives, options.prior, call.scale)
        if several:
            return (lse if options.decoupled else torch.logaddexp(lse, positive)).mean()
        return (lse - positive if options.decoupled else cross_entropy(lse, positive)).mean()

    total = side(rows[RowStat.LSE_STUDENT], rows[RowStat.NEGATIVES])
    if columns is not None:
        taken = groups.of_columns()[groups.window] if dropped and groups.ids is not None else torch.ones_like(positive)
        total = 0.5 * (total + side(columns[ColumnStat.LSE_STUDENT], groups.all_rows - taken))
    if several:
        total = total - _targets(call, options, groups, columns is not None).mean() * (1 if columns is None else 0.5)
    return total


def _targets(call: SimilarityCall, options: Contrastive, groups: Groups, symmetric: bool) -> Tensor:  # [N]
    """Σ_j t_ij z_ij of each row, and, if symmetric, of the targets of each column j in that row too.

    The targets of a column without a pair are 0.
    """
    wide, smooth, drop = accumulate_dtype(call.image.dtype), options.label_smoothing, options.positives == "drop"
    image, text = call.image.to(wide), call.text.to(wide)
    n, m, window = groups.n, groups.m, groups.window
    pairs = Groups(n, m, window.start, None, None, groups.gathered) if drop else groups

    def vector(size: int, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, device=image.device).to(wide).expand(size)

    def share(size: int, of_positives: Tensor | int, candidates: Tensor | int) -> tuple[Tensor, Tensor]:
        """The targets of a positive and of any candidate."""
        several = 1 / vector(size, of_positives).clamp(min=1) if options.positives == "ids" else vector(size, 1.0)
        return (1 - smooth) * several, smooth / vector(size, candidates).clamp(min=1)

    def compared(values: Tensor) -> Tensor:  # [M, D] -> [N, D]
        """Sums over the candidates: all columns but those that are dropped."""
        everything = values.sum(0).expand(n, -1)
        dropped = drop and groups.ids is not None
        return everything - groups.sums(values) + values[window] if dropped else everything

    matched, any_other = share(n, pairs.of_rows(), m - groups.of_rows() + 1 if drop else m)
    target = pairs.sums(text) * matched[:, None]
    target = target + compared(text) * any_other[:, None] if smooth else target
    of_pair = matched + any_other
    if symmetric:
        rows = groups.all_rows
        matched, any_other = share(m, pairs.of_columns(), rows - groups.of_columns() + 1 if drop else rows)
        if not groups.gathered:
            covered = torch.zeros(m, dtype=wide, device=image.device)
            covered[window] = 1
            matched, any_other = matched * covered, any_other * covered
        target = target + pairs.sums(text * matched[:, None])
        target = target + compared(text * any_other[:, None]) if smooth else target
        of_pair = of_pair + (matched + any_other)[window]
    return call.scale * torch.linalg.vecdot(image, target) - of_pair * options.margin
