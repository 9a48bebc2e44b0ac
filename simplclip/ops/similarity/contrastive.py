"""The contrastive term with its options, in plain torch, from statistics of rows and columns and from sums over the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall
from simplclip.ops.similarity.positives import SameIds
from simplclip.ops.similarity.terms import cross_entropy


@dataclass
class Contrastive:
    """Options of the contrastive term; see simplclip.ops.similarity_loss."""

    label_smoothing: float = 0.0
    decoupled: bool = False
    prior: Tensor | float | None = None  # [] or [N], of the debiased loss
    margin: float = 0.0
    positives: str = "drop"

    @property
    def plain(self) -> bool:
        """Whether a row's loss is its cross-entropy to its pair: a kernel computes this loss, with or without a margin."""
        given = [(getattr(self, name), default) for name, default in _OTHER_THAN_PLAIN.items()]
        return all(value is None if default is None else value == default for value, default in given)


_OTHER_THAN_PLAIN = {field.name: field.default for field in fields(Contrastive) if field.name != "margin"}


def _debiased(lse: Tensor, positive: Tensor, negatives: Tensor, prior: Tensor | float, scale: Tensor) -> Tensor:  # [N] each
    """Returns log(n g), g = max((ē − τ e^{z⁺}) / (1 − τ), e^{−s}): n negatives, ē the mean of their e^z, τ the prior."""
    count = negatives.clamp(min=1)
    top = torch.maximum(lse, positive).detach()  # subtracted from the logits, so that no exponential overflows
    corrected = ((lse - top).exp() / count - prior * (positive - top).exp()) / (1 - prior)
    tiny = torch.finfo(lse.dtype).tiny
    log = torch.where(corrected < tiny, -torch.inf, top + corrected.clamp(min=tiny).log())
    return torch.where(negatives > 0, count.log() + torch.maximum(log, -scale), -torch.inf)


def contrastive(
    call: SimilarityCall,
    options: Contrastive,
    same_ids: SameIds,
    rows: Tensor,  # [11, N] RowStat
    columns: Tensor | None,  # [5, N] ColumnStat of the columns of the pairs; None: the row direction only
) -> Tensor:  # []
    """Returns the mean over rows and columns of D − Σ_j t_j z_j: D the log of the denominator, t the targets, z the logits.

    It is computed as (D − z⁺) − Σ_j t_j (z_j − z⁺), whose first part is exact for well matched pairs too.
    """
    positive = call.scale * rows[RowStat.DIAGONAL_STUDENT] - options.margin
    dropped = options.positives == "drop" or options.decoupled  # whether pairs with equal ids are left out of the softmax

    def side(lse: Tensor, count: Tensor | int) -> Tensor:  # count: the number of negatives, [N] or equal for all rows
        if options.prior is None and not options.decoupled:
            return cross_entropy(lse, positive).mean()
        negatives = lse.new_zeros(()) + count
        if options.prior is not None:
            lse = _debiased(lse, positive, negatives, options.prior, call.scale)
        if options.decoupled:  # a row without negatives has 0, but NaN if its positive is infinite, as in cross_entropy
            return torch.where(negatives > 0, lse - positive, 0 * positive).mean()
        return cross_entropy(lse, positive).mean()

    total = side(rows[RowStat.LSE_STUDENT], same_ids.m - (same_ids.of_rows() if dropped else 1))
    if columns is not None:
        taken = same_ids.of_columns()[same_ids.window] if dropped and same_ids.given else 1
        total = 0.5 * (total + side(columns[ColumnStat.LSE_STUDENT], same_ids.all_rows - taken))
    if options.label_smoothing or options.positives != "drop":
        total = total - _other_targets(call, options, same_ids, columns is not None)
    return total


def _other_targets(call: SimilarityCall, options: Contrastive, same_ids: SameIds, symmetric: bool) -> Tensor:  # []
    """Returns the mean over rows of Σ_j t_ij (z_ij − z_i⁺); if symmetric, half of this mean plus half of the columns' mean.

    t are the targets of a row's columns. In the columns' direction a column without a pair has the targets 0.
    """
    wide, smooth, drop = accumulate_dtype(call.image.dtype), options.label_smoothing, options.positives == "drop"
    image, text = call.image.to(wide), call.text.to(wide)
    n, m, window = same_ids.n, same_ids.m, same_ids.window
    pairs = same_ids.without_ids() if drop else same_ids

    def vector(size: int, value: Tensor | float) -> Tensor:
        return image.new_zeros(size) + value

    def share(size: int, own: Tensor | int, others: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the targets of a positive and of any candidate, and their sum: 1, or 0 if decoupled and without negatives.

        own: how many have the id of each row or column; others: how many have another id.
        """
        counts = vector(size, others > 0) if options.decoupled else vector(size, 1)
        several = 1 / vector(size, 1 if drop else own).clamp(min=1)
        candidates = others + 1 if drop else others + own
        return (1 - smooth) * several * counts, smooth * counts / vector(size, candidates).clamp(min=1), counts

    def compared(values: Tensor) -> Tensor:  # [M, D] -> [N, D]
        """Sums the values over each row's candidates: all columns but those that are dropped."""
        everything = values.sum(0).expand(n, -1)
        dropped = drop and same_ids.given
        return everything - same_ids.sums(values) + values[window] if dropped else everything

    matched, any_other, sides = share(n, same_ids.of_rows(), m - same_ids.of_rows())
    target = pairs.sums(text) * matched[:, None]
    target = target + compared(text) * any_other[:, None] if smooth else target
    of_pair = matched + any_other
    if symmetric:
        matched, any_other, counts = share(m, same_ids.of_columns(), same_ids.all_rows - same_ids.of_columns())
        if not same_ids.gathered:
            covered = torch.zeros(m, dtype=wide, device=image.device)
            covered[window].fill_(1)  # in torch 2.11 an assignment would copy the number from the host
            matched, any_other = matched * covered, any_other * covered
        target = target + pairs.sums(text * matched[:, None])
        target = target + compared(text * any_other[:, None]) if smooth else target
        of_pair, sides = of_pair + (matched + any_other)[window], sides + counts[window]
    out = call.scale * (image * (target - sides[:, None] * text[window])).sum(1) + options.margin * (sides - of_pair)
    return out.mean() / (2 if symmetric else 1)
