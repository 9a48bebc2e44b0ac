"""Terms of similarity_loss from the statistics of the similarity matrices, and their gradients, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.registry import first_order_only
from simplclip.ops.similarity.call import ColumnStat, RowStat


def mismatch(l: Tensor) -> Tensor:
    """Returns softplus(-l) for the logits l of positives. NaN where l is infinite, even if the softplus would be 0."""
    return 0 * l - F.logsigmoid(l)  # F.softplus is exact to e^-20 only


class Statistics(NamedTuple):
    """The statistics of a sweep in both directions, which are rows and columns, or rows alone: S is 2 or 1."""

    lse: Tensor  # [S, N] of the student's logits over the negatives
    teacher_lse: Tensor | None  # [S, N]
    mean: Tensor | None  # [S, N] of entropy T - Z under the teacher's softmax over the negatives
    diagonal: Tensor  # [N] the positives' similarities
    teacher_diagonal: Tensor | None  # [N]
    unmatched: Tensor  # [N] sums of softplus(l) of pair matching over the negatives

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor | None, teacher: bool) -> Statistics:
        """rows: [6, N] RowStat; columns: [3, N] ColumnStat of the positives' columns, or None for rows alone."""
        if columns is None:
            lse, teacher_lse, mean = rows[:3].unsqueeze(1).unbind()
        elif teacher:
            lse, teacher_lse, mean = torch.stack([rows[:3], columns], 1).unbind()
        else:
            lse, teacher_lse, mean = torch.stack([rows[RowStat.LSE_STUDENT], columns[ColumnStat.LSE_STUDENT]]), None, None
        _, _, _, diagonal, teacher_diagonal, unmatched = rows.unbind()
        return cls(lse, teacher_lse, mean, diagonal, teacher_diagonal, unmatched)


class Options(NamedTuple):
    """What `Terms` computes."""

    contrastive: bool
    relational: bool
    entropy: float  # 1: the relational term is a KL divergence; 0: a cross-entropy, i.e. the KL plus the teacher's entropy
    negatives: Tensor | int  # the number of all negatives of pair matching, at least 1
    weights: tuple[float, ...] | None  # of contrastive, relational and pair matching, those that there are


class Terms(torch.autograd.Function):
    """Contrastive, relational and pair matching terms [], in this order, those that there are.

    With weights, the first result is their weighted sum, which alone has a gradient. Cross-entropies are softplus(lse - z)
    with lse over the negatives: exact for well matched pairs too, and NaN where the positive z is infinite, as in
    F.cross_entropy.
    With m = 1 - softmax(T) of the positive, r and r̂ the log-sum-exps over the whole row, a row's divergence is
    r - E_T[Z] + entropy (E_T[T] - r̂) = (r - z) - entropy (r̂ - t) + m (mean + z - entropy t).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # [6, N]
        columns: Tensor | None,  # [3, N]
        scale: Tensor,  # []
        teacher_scale: Tensor | None,  # []
        weight: Tensor | None,  # [] of the plane of pair matching
        bias: Tensor | None,  # []
        options: Options,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, columns, scale, teacher_scale, weight, bias)
        ctx.options = options
        stats = Statistics.of(rows, columns, options.relational)
        positive = scale * stats.diagonal
        cross_entropy = 0 * positive - F.logsigmoid(positive - stats.lse)
        terms = [cross_entropy.mean()] if options.contrastive else []
        if options.relational:
            teacher = teacher_scale * stats.teacher_diagonal
            margin = teacher - stats.teacher_lse
            loss = cross_entropy + torch.sigmoid(-margin) * (stats.mean + positive - options.entropy * teacher)
            terms.append((loss + options.entropy * F.logsigmoid(margin) + 0 * teacher).mean())
        if weight is not None:
            matched = mismatch(torch.addcmul(bias, weight, stats.diagonal)).mean()
            terms.append(0.5 * (matched + stats.unmatched.sum() / options.negatives))
        if options.weights is None:
            return tuple(terms)
        total = options.weights[0] * terms[0]
        for weight_of_term, term in zip(options.weights[1:], terms[1:]):
            total = torch.add(total, term, alpha=weight_of_term)
        ctx.mark_non_differentiable(*terms)
        return total, *terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, options = ctx.saved_tensors, ctx.options
        with torch.no_grad():
            count = options.contrastive + options.relational + (saved[4] is not None)
            own = grads if options.weights is None else [w * grads[0] for w in options.weights]
            gradients = _gradients(*saved, options, list(own[:count]))
        if torch.is_grad_enabled():  # with create_graph=True
            gradients = first_order_only("similarity_loss", gradients, *saved, *grads)
        return *gradients, None


def _gradients(rows, columns, scale, teacher_scale, weight, bias, options: Options, grads: list[Tensor]):
    """Returns the gradients of rows, columns, scale, teacher_scale (None), weight and bias."""
    stats = Statistics.of(rows, columns, options.relational)
    count, zero = stats.lse.numel(), torch.zeros_like(stats.diagonal)
    d_matched = grads.pop() if weight is not None else None
    d_sum = grads[0] if len(grads) == 1 else grads[0] + grads[1]
    d_lse = torch.sigmoid(stats.lse - scale * stats.diagonal) * (d_sum / count)
    d_positive, d_mean = -d_lse.sum(0), None
    if options.relational:
        d_mean = torch.sigmoid(stats.teacher_lse - teacher_scale * stats.teacher_diagonal) * (grads[-1] / count)
        d_positive += d_mean.sum(0)
    d_diagonal, d_unmatched, d_weight, d_bias = scale * d_positive, zero, None, None
    if weight is not None:
        logits = torch.addcmul(bias, weight, stats.diagonal)
        slope = torch.sigmoid(-logits) * (-0.5 / len(zero) * d_matched)
        d_diagonal += weight * slope
        d_weight, d_bias = slope.dot(stats.diagonal), slope.sum()
        d_unmatched = (0.5 * d_matched / options.negatives).expand_as(zero)
    row_mean = zero if d_mean is None else d_mean[0]
    d_rows = torch.stack([d_lse[0], zero, row_mean, d_diagonal, zero, d_unmatched])
    d_columns = None
    if columns is not None:
        d_columns = torch.stack([d_lse[1], zero, zero if d_mean is None else d_mean[1]])
    return d_rows, d_columns, d_positive.dot(stats.diagonal), None, d_weight, d_bias


def merge_columns(parts: Tensor) -> Tensor:  # [W, 3, N] -> [3, N]
    """Merges statistics of the same columns, each over the rows of one rank, into the statistics over the rows of all ranks.

    Differentiable in the student's log-sum-exps and in the means, whose weights are the teacher's softmax, a constant.
    """

    def lse(part: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
        empty = (part == -torch.inf).all(0)
        total = torch.where(empty, -torch.inf, part.masked_fill(empty, 0).logsumexp(0))
        return total, (part.detach() - total.detach().masked_fill(empty, 0)).exp()

    student, _ = lse(parts[:, ColumnStat.LSE_STUDENT])
    teacher, share = lse(parts[:, ColumnStat.LSE_TEACHER])
    return torch.stack([student, teacher, (share * parts[:, ColumnStat.MEAN]).sum(0)])
