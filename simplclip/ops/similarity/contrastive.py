"""The contrastive term with its options, in plain torch, from statistics of rows and columns and from sums over the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import SimilarityCall
from simplclip.ops.similarity.positives import Groups


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
    pair: Tensor,  # [N] cosine of the pair
    rows: tuple[Tensor, Tensor],  # [N] log-sum-exp over the negatives, their number
    columns: tuple[Tensor, Tensor] | None,  # the same of the columns of the pairs
) -> Tensor:  # []
    """The mean over rows and columns of D − Σ_j t_j z_j: D the log of the denominator, t the targets, z the logits."""
    positive = call.scale * pair - options.margin
    total = 0.0
    for lse, negatives in (rows,) if columns is None else (rows, columns):
        if options.prior is not None:
            lse = _debiased(lse, positive, negatives, options.prior, call.scale)
        if not options.decoupled:
            # log(e^lse + e^z⁺) − z⁺, exact for well matched pairs too; NaN where the positive is infinite.
            lse = positive - F.logsigmoid(positive - lse) + 0 * pair.detach()
        total = total + lse
    sides = 1 if columns is None else 2
    if options.label_smoothing or options.positives != "drop":
        total = total - _targets(call, options, groups, positive - call.scale * pair, columns is not None)
    else:
        total = total - sides * positive
    return total.mean() / sides


def _targets(call: SimilarityCall, options: Contrastive, groups: Groups, shift: Tensor, symmetric: bool) -> Tensor:  # [N]
    """Σ_j t_ij z_ij of each row, and, if symmetric, of the targets of each column j in that row too.

    shift: what is added to the logit of the pair. Targets of the columns without a pair are 0.
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
    return call.scale * torch.linalg.vecdot(image, target) + of_pair * shift
