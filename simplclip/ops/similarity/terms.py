"""Terms of similarity_loss from the statistics of the similarity matrices, and their gradients, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.registry import first_order_only
from simplclip.ops.similarity.call import ColumnStat


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), exact beyond the 20 from which F.softplus by default returns x."""
    return F.softplus(x, threshold=80)


def mismatch(l: Tensor) -> Tensor:
    """Returns softplus(-l) for the logits l of positives. NaN where l is infinite, even if the softplus would be 0."""
    return torch.add(softplus(-l), l, alpha=0)


class Options(NamedTuple):
    """What `Terms` computes."""

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
    excess, teacher_excess, logits = lse - positive, None, None
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
        logits = torch.addcmul(bias, weight, diagonal)
        terms.append(0.5 * (mismatch(logits).mean() + unmatched.sum() / options.negatives))
    if options.weights is not None:
        total = options.weights[0] * terms[0]
        for factor, term in zip(options.weights[1:], terms[1:]):
            total = torch.add(total, term, alpha=factor)
        terms = [total, *terms]
    return terms, (diagonal, excess, teacher_excess, logits)


class Terms(torch.autograd.Function):
    """The terms of `values`: one node of autograd. With weights, their sum alone has a gradient."""

    @staticmethod
    def forward(ctx: Any, rows, columns, scale, teacher_scale, weight, bias, options: Options) -> tuple[Tensor, ...]:
        terms, for_backward = values(rows, columns, scale, teacher_scale, weight, bias, options)
        ctx.save_for_backward(rows, columns, scale, weight, *for_backward)
        ctx.options = options
        if options.weights is not None:
            ctx.mark_non_differentiable(*terms[1:])
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved: Any = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _gradients(*saved, options=ctx.options, grads=grads)
        with torch.no_grad():  # with create_graph=True
            gradients = _gradients(*saved, options=ctx.options, grads=grads)
        return first_order_only("similarity_loss", gradients, *saved, *grads)


def _gradients(rows, columns, scale, weight, diagonal, excess, teacher_excess, logits, *, options: Options, grads):
    """Returns the gradients of forward's arguments, those of constants as None."""
    if options.weights is not None:
        grads = [factor * grads[0] for factor in options.weights]
    zero, d_weight, d_bias = torch.zeros_like(diagonal), None, None
    d_unmatched, d_mean = zero, (zero, zero)
    softmaxes = grads if weight is None else grads[:-1]
    share = softmaxes[0] if len(softmaxes) == 1 else softmaxes[0] + softmaxes[1]
    d_lse = (torch.sigmoid(excess) * (share / excess.numel())).view(-1, len(diagonal))
    d_positive = d_lse.sum(0).neg_()
    if options.relational:
        d_mean = (torch.sigmoid(teacher_excess) * (softmaxes[-1] / excess.numel())).view(d_lse.shape)
        d_positive += d_mean.sum(0)
    d_diagonal = scale * d_positive
    if weight is not None:
        slope = torch.sigmoid(-logits) * (-0.5 / len(diagonal) * grads[-1])
        d_diagonal += weight * slope
        d_weight, d_bias = slope.dot(diagonal), slope.sum()
        d_unmatched = (0.5 * grads[-1] / options.negatives).expand_as(zero)
    d_rows = torch.stack([d_lse[0], zero, d_mean[0], d_diagonal, zero, d_unmatched])
    d_columns = None if columns is None else torch.stack([d_lse[1], zero, d_mean[1]])
    return d_rows, d_columns, d_positive.dot(diagonal), None, d_weight, d_bias, None


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
