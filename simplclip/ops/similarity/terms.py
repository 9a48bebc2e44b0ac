"""Terms of similarity_loss from the statistics of the similarity matrices, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.similarity import ColumnStat


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), exact also above 20, where F.softplus by default returns x."""
    return F.softplus(x, threshold=80)


def nan_of_infinite(values: Tensor, logits: Tensor) -> Tensor:
    """Returns the values, NaN where the positives' logits are infinite, which get no gradient."""
    return torch.add(values, logits.detach(), alpha=0)


class Sigmoid(NamedTuple):
    """The numbers of a sigmoid term, in the order of SigmoidRow."""

    weight: Tensor  # []
    bias: Tensor | float
    negative: Tensor | float
    positive: float
    mix: float


class Options(NamedTuple):
    """What `values` computes."""

    contrastive: bool
    relational: bool
    entropy: float  # 1: the relational term is a KL divergence; 0: a cross-entropy
    negatives: Tensor | int  # the number of all negatives of pair matching, at least 1
    weights: tuple[float, ...] | None  # of the terms that `values` returns


def values(
    rows: Tensor,  # [6, N] RowStat
    columns: Tensor | None,  # [3, N] ColumnStat of the positives' columns; None: rows alone
    scale: Tensor,  # []
    teacher_scale: Tensor | None,  # []
    plane: tuple[Tensor, Tensor] | None,  # weight [] and bias [] of pair matching
    options: Options,
) -> list[Tensor]:
    """Returns terms [] as options asks for: contrastive, relational, pair matching (with plane).

    With weights, the weighted sum comes first. Cross-entropies are softplus(lse - z) with lse over
    the negatives: exact for well matched pairs too, and NaN where the positive's logit z is
    infinite, as in F.cross_entropy. With the teacher's logits T and its t of the positive, m = 1 -
    softmax(T) of the positive, r and r̂ the student's and the teacher's log-sum-exps over the whole
    row, a row's divergence is

    r - E_T[Z] + entropy (E_T[T] - r̂) = (r - z) - entropy (r̂ - t) + m (mean + z - entropy t).
    """
    # of the parts that are not used, autograd makes zeros one by one
    lse, of_teacher, diagonal, teacher_diagonal, unmatched = rows.split_with_sizes([1, 2, 1, 1, 1])
    of_teacher = of_teacher.unsqueeze(1)
    if columns is not None:  # both directions, [2, N]
        column_lse, of_columns = columns.split_with_sizes([1, 2])
        lse = torch.cat([lse, column_lse])
    terms = []
    positive = scale * diagonal
    cross_entropy = nan_of_infinite(softplus(lse - positive), positive)
    if options.contrastive:
        terms.append(cross_entropy.mean())
    if options.relational:
        assert teacher_scale is not None
        if columns is not None:
            of_teacher = torch.cat([of_teacher, of_columns.unsqueeze(1)], 1)
        teacher_lse, mean = of_teacher.unbind()
        teacher = teacher_scale * teacher_diagonal.detach()
        teacher_excess = teacher_lse.detach() - teacher
        gap = torch.sub(mean + positive, teacher, alpha=options.entropy)
        loss = cross_entropy + torch.sigmoid(teacher_excess) * gap
        loss = torch.sub(loss, softplus(teacher_excess), alpha=options.entropy)
        terms.append(nan_of_infinite(loss, teacher).mean())
    if plane is not None:
        weight, bias = plane
        logits = torch.addcmul(bias, weight, diagonal)  # of the positives
        unmatched_share = unmatched.sum() * (0.5 / options.negatives)
        matched_sum = nan_of_infinite(softplus(-logits), logits).sum()
        terms.append(torch.add(unmatched_share, matched_sum, alpha=0.5 / rows.shape[1]))
    if options.weights is not None:
        first, *factors = options.weights
        total = terms[0]
        if first != 1 or not factors:
            total = total * first
        for factor, term in zip(factors, terms[1:]):
            total = torch.add(total, term, alpha=factor)
        terms = [total, *terms]
    return terms


def merge_columns(parts: Tensor) -> Tensor:  # [W, 3, N] -> [3, N]
    """Merges ColumnStat of W sets of rows; -inf is the log-sum-exp of no negatives."""

    def merged(part: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
        """Returns the log-sum-exps over all rows, and each set's share of their exponentials."""
        empty = (part == -torch.inf).all(0)
        part = part.masked_fill(empty, 0)
        lse = part.logsumexp(0).masked_fill(empty, -torch.inf)
        # softmax, since exp(part - lse) would not add up to 1: means as large as the logits would
        # lose digits.
        return lse, part.softmax(0).masked_fill(empty, 0)

    student, _ = merged(parts[:, ColumnStat.LSE_STUDENT])
    teacher, shares = merged(parts[:, ColumnStat.LSE_TEACHER].detach())
    return torch.stack([student, teacher, (shares * parts[:, ColumnStat.MEAN]).sum(0)])
