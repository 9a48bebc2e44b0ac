"""The terms of similarity_loss, and their gradients, from statistics of the similarity matrices.

With r and c the log-sum-exps of the negatives in a row and column of Z, and z the positive's logit,
a cross-entropy is softplus(r - z): exact for well matched pairs too. With the teacher's logits T
and its t of the positive, m = 1 - softmax(T) of the positive, and the log-sum-exps R and R̂ of whole
rows, a row's divergence is

    R - E_T[Z] + entropy (E_T[T] - R̂) = (R - z) - entropy (R̂ - t) + m (mean + z - entropy t).

All are linear or softplus in the student's statistics, so that the gradients are closed formulas.

csrc/cpu/similarity/terms.h has the same formulas for the CPU's kernels, without a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.similarity import ColumnStat, RowStat

SLOTS = len(RowStat)  # a statistic of columns stands so many rows below that of rows
_STUDENT = RowStat.LSE_STUDENT, RowStat.DIAGONAL_STUDENT
_TEACHER = RowStat.LSE_TEACHER, RowStat.DIAGONAL_TEACHER


def _softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), exact also above 20, where F.softplus by default returns x."""
    return F.softplus(x, threshold=80)


def _nan_of_infinite(values: Tensor, logits: Tensor) -> Tensor:
    """Returns values that are NaN where a positive's logit is infinite, as in F.cross_entropy."""
    return torch.add(values, logits, alpha=0)


def _excess(
    stats: Tensor, stat: RowStat, diagonal: RowStat, scale: Any
) -> tuple[Tensor, Tensor]:  # [N], [2, N]
    """Returns the logits of the positives, and the log-sum-exps of their rows and columns, minus
    these.
    """
    positive = scale * stats[diagonal]
    return positive, stats[stat::SLOTS] - positive


def terms(call: Any, stats: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns those of the terms contrastive, relational and pair matching that a call asks for,
    and the log-sum-exps minus the positives' logits for `gradients`, in a row for each matrix and
    direction.

    call: a SimilarityCall. stats: RowStat [6, N] and, with both directions, below them ColumnStat
    [3, N] of the positives' columns. A term is NaN where a positive's logit is infinite.
    """
    results = []
    positive, excess = _excess(stats, *_STUDENT, call.scale)
    cross_entropy = _nan_of_infinite(_softplus(excess), positive)
    if call.contrastive:
        results.append(cross_entropy.mean())
    if call.has_teacher:
        teacher, teacher_excess = _excess(stats, *_TEACHER, call.teacher_scale)
        gap = torch.sub(stats[RowStat.MEAN :: SLOTS] + positive, teacher, alpha=call.entropy)
        loss = cross_entropy + torch.sigmoid(teacher_excess) * gap
        loss = torch.sub(loss, _softplus(teacher_excess), alpha=call.entropy)
        results.append(_nan_of_infinite(loss, teacher).mean())
        excess = torch.cat([excess, teacher_excess])
    if call.plane_weight is not None:
        diagonal = stats[RowStat.DIAGONAL_STUDENT]
        logits = torch.addcmul(call.plane_bias, call.plane_weight, diagonal)
        losses = _nan_of_infinite(F.logsigmoid(logits), logits).mul_(-0.5 / diagonal.shape[0])
        share = call.negative_share
        if isinstance(share, Tensor):
            losses.addcmul_(stats[RowStat.PAIR_MATCHING], share)
        else:
            losses.add_(stats[RowStat.PAIR_MATCHING], alpha=share)
        results.append(losses.sum())
    return results, excess


def gradients(call: Any, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of Σ factor · term: of stats, minus that of scale [], and -2 N times
    that of the plane [2], or None without; the last two as far as the terms depend on these beside
    stats.

    call: a TermsGradient. factors: of the terms that `terms` returns.
    """
    rows, excess = call.row_stats, call.excess
    diagonal = rows[RowStat.DIAGONAL_STUDENT]
    slots = SLOTS + (len(ColumnStat) if call.columns else 0)
    d_stats = rows.new_zeros(slots, rows.shape[1])
    d_diagonal = d_stats[RowStat.DIAGONAL_STUDENT]
    d_plane = None
    weight = call.plane_weight
    if weight is not None:
        *factors, factor = factors
        share = call.negative_share
        if isinstance(share, Tensor):
            d_stats[RowStat.PAIR_MATCHING].addcmul_(factor, share)
        else:
            d_stats[RowStat.PAIR_MATCHING].add_(factor, alpha=share)
        minus_logits = torch.addcmul(call.plane_bias, weight, diagonal).neg_()
        # by minus the logits and times 2 N, which is made up for without one more pass
        d_logits = torch.sigmoid(minus_logits).mul_(factor)
        d_plane = torch.stack([torch.dot(d_logits, diagonal), d_logits.sum()])
        d_diagonal.addcmul_(d_logits, weight, value=-0.5 / diagonal.shape[0])
    directions = 2 if call.columns else 1
    share = 1 / (directions * rows.shape[1])
    both = factors[0] if len(factors) == 1 else factors[0] + factors[1]
    d_lse = torch.sigmoid(excess[:directions], out=d_stats[RowStat.LSE_STUDENT :: SLOTS])
    d_excess = d_lse.mul_(both * share).sum(0)
    if call.has_teacher:
        d_mean = torch.sigmoid(excess[directions:], out=d_stats[RowStat.MEAN :: SLOTS])
        d_excess -= d_mean.mul_(factors[-1] * share).sum(0)
    d_diagonal.addcmul_(d_excess, call.scale, value=-1)
    return d_stats, torch.dot(d_excess, diagonal), d_plane


def merged(parts: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
    """Returns the log-sum-exps over all rows, and each set's share of their exponentials.

    -inf is the log-sum-exp of no negatives.
    """
    empty = (parts == -torch.inf).all(0)
    parts = parts.masked_fill(empty, 0)
    lse = parts.logsumexp(0).masked_fill(empty, -torch.inf)
    # softmax, since exp(parts - lse) would not add up to 1: means as large as the logits would lose
    # digits.
    return lse, parts.softmax(0).masked_fill(empty, 0)


def merge_columns(parts: Tensor) -> Tensor:  # [W, 3, N] -> [3, N]
    """Merges ColumnStat of W sets of rows."""
    student, _ = merged(parts[:, ColumnStat.LSE_STUDENT])
    teacher, shares = merged(parts[:, ColumnStat.LSE_TEACHER])
    return torch.stack([student, teacher, (shares * parts[:, ColumnStat.MEAN]).sum(0)])


def of_parts(gradient: Tensor, parts: Tensor) -> Tensor:  # [3, N], [W, 3, N] -> [W, 3, N]
    """Returns the gradients of merge_columns's parts from that of its result."""
    result = torch.zeros_like(parts)
    _, shares = merged(parts[:, ColumnStat.LSE_STUDENT])
    torch.mul(shares, gradient[ColumnStat.LSE_STUDENT], out=result[:, ColumnStat.LSE_STUDENT])
    _, shares = merged(parts[:, ColumnStat.LSE_TEACHER])
    torch.mul(shares, gradient[ColumnStat.MEAN], out=result[:, ColumnStat.MEAN])
    return result
