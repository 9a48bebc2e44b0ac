"""Terms of similarity_loss from the statistics of the similarity matrices, and their gradients, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.similarity.call import ColumnStat


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), exact beyond the 20 from which F.softplus by default returns x."""
    return F.softplus(x, threshold=80)


def mismatch(negated: Tensor) -> Tensor:
    """Returns softplus(-l) from the negated logits -l of positives. NaN where l is infinite, even if softplus would be 0."""
    return torch.add(softplus(negated), negated, alpha=0)


class Options(NamedTuple):
    """What `values` computes."""

    contrastive: bool
    relational: bool
    entropy: float  # 1: the relational term is a KL divergence; 0: a cross-entropy, i.e. the KL plus the teacher's entropy
    negatives: Tensor | int  # the number of all negatives of pair matching, at least 1
    weights: tuple[float, ...] | None  # of contrastive, relational and pair matching, those that there are


def values(
    rows: Tensor,  # [6, N] RowStat
    columns: Tensor | None,  # [3, N] ColumnStat of the positives' columns; None: rows alone
    scale: Tensor,  # []
    teacher_scale: Tensor | None,  # []
    weight: Tensor | None,  # [] of the plane of pair matching
    bias: Tensor | None,  # []
    options: Options,
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Returns contrastive, relational and pair matching terms [], in this order, those there are, and what backward needs.

    With weights, the weighted sum comes first. Cross-entropies are softplus(lse - z) with lse over the negatives: exact for
    well matched pairs too, and NaN where the positive z is infinite, as in F.cross_entropy. With m = 1 - softmax(T) of the
    positive, r and r̂ the log-sum-exps over the whole row, a row's divergence is
    r - E_T[Z] + entropy (E_T[T] - r̂) = (r - z) - entropy (r̂ - t) + m (mean + z - entropy t).
    """
    lse, teacher_lse, mean, diagonal, teacher_diagonal, unmatched = rows.unbind()
    if columns is not None:  # both directions, [2, N]
        lse = torch.stack([lse, columns[ColumnStat.LSE_STUDENT]])
    positive, terms = scale * diagonal, []
    excess, teacher_excess, negated = lse - positive, None, None
    cross_entropy = torch.add(softplus(excess), positive, alpha=0)
    if options.contrastive:
        terms.append(cross_entropy.mean())
    if options.relational:
        if columns is not None:
            teacher_lse, mean = torch.stack([rows[1:3], columns[1:3]], 1).unbind()
        teacher = teacher_scale * teacher_diagonal
        teacher_excess = teacher_lse - teacher
        loss = cross_entropy + torch.sigmoid(teacher_excess) * (mean + positive - options.entropy * teacher)
        terms.append((loss - options.entropy * softplus(teacher_excess) + 0 * teacher).mean())
    if weight is not None:
        negated = -torch.addcmul(bias, weight, diagonal)  # the logits of the positives
        share = 0.5 / options.negatives
        terms.append(torch.add(unmatched.sum() * share, mismatch(negated).sum(), alpha=0.5 / diagonal.shape[0]))
    if options.weights is not None:
        first, *factors = options.weights
        total = terms[0] if first == 1 and factors else terms[0] * first
        for factor, term in zip(factors, terms[1:]):
            total = torch.add(total, term, alpha=factor)
        terms = [total, *terms]
    return terms, (diagonal, excess, teacher_excess, negated)


def values_backward(
    grads: Sequence[Tensor],  # [] of the results of `values`
    options: Options,
    scale: Tensor,  # []
    weight: Tensor | None,  # []
    diagonal: Tensor,  # [N], and what else `values` returned for backward
    excess: Tensor,  # [N] or [2, N]
    teacher_excess: Tensor | None,
    negated: Tensor | None,  # [N]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of rows, columns, scale, weight and bias."""
    if options.weights is not None:
        grads = [grads[0] if factor == 1 else factor * grads[0] for factor in options.weights]
    n, zero = diagonal.shape[0], torch.zeros_like(diagonal)
    d_unmatched = zero
    d_mean: Any = (zero, zero)
    softmaxes = grads if weight is None else grads[:-1]
    share = softmaxes[0] if len(softmaxes) == 1 else softmaxes[0] + softmaxes[1]
    d_lse = (torch.sigmoid(excess) * (share / excess.numel())).view(-1, n)
    d_positive = d_lse.sum(0).neg_()
    if options.relational:
        d_mean = (torch.sigmoid(teacher_excess) * (softmaxes[-1] / excess.numel())).view(-1, n)
        d_positive += d_mean.sum(0)
    d_diagonal, d_weight, d_bias = scale * d_positive, None, None
    if weight is not None:
        slope = torch.sigmoid(negated) * (-0.5 / n * grads[-1])
        d_diagonal.addcmul_(slope, weight)
        d_weight, d_bias = slope.dot(diagonal), slope.sum()
        d_unmatched = (0.5 / options.negatives * grads[-1]).expand_as(zero)
    d_rows = torch.stack([d_lse[0], zero, d_mean[0], d_diagonal, zero, d_unmatched])
    d_columns = torch.stack([d_lse[1], zero, d_mean[1]]) if excess.dim() == 2 else None
    return d_rows, d_columns, d_positive.dot(diagonal), d_weight, d_bias


def merge_columns(parts: Tensor) -> tuple[Tensor, Tensor]:  # [W, 3, N] -> [3, N], [W, 3, N]
    """Merges statistics of the same columns, each over the rows of one rank, into the statistics over the rows of all ranks.

    Also returns the derivatives of the merged statistics with respect to each rank's: the rank's share of the student's
    exponentials for the log-sum-exps, 0 for the teacher's, and its share of the teacher's exponentials for the means.
    """

    def merged(part: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
        empty = (part == -torch.inf).all(0)
        part = part.masked_fill(empty, 0)
        # softmax, since exp(part - logsumexp) would not add up to 1: means as large as the logits would lose digits.
        return part.logsumexp(0).masked_fill(empty, -torch.inf), part.softmax(0).masked_fill(empty, 0)

    student, of_student = merged(parts[:, ColumnStat.LSE_STUDENT])
    teacher, of_teacher = merged(parts[:, ColumnStat.LSE_TEACHER])
    mean = (of_teacher * parts[:, ColumnStat.MEAN]).sum(0)
    return torch.stack([student, teacher, mean]), torch.stack([of_student, torch.zeros_like(of_teacher), of_teacher], 1)
