"""From the statistics of the similarity matrices to the terms of similarity_loss: vectors of N, plain torch, by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import ColumnStat, RowStat


def mismatch(l: Tensor) -> Tensor:
    """softplus(-l) of a positive; NaN where l is infinite, though the softplus may be 0."""
    return 0 * l.detach() - F.logsigmoid(l)  # F.softplus is exact to e^-20 only


def cross_entropy(lse: Tensor, positive: Tensor) -> Tensor:
    """-log softmax of the positive as softplus(lse - z), lse over the negatives: exact for well matched pairs too.

    NaN where the positive is infinite, as F.cross_entropy's, though the softplus be 0.
    """
    return 0 * positive.detach() - F.logsigmoid(positive - lse)


def divergence(
    lse: Tensor,  # [N] of the student's logits, over the negatives
    positive: Tensor,  # [N]
    teacher_lse: Tensor,  # [N]
    teacher_positive: Tensor,  # [N]
    mean: Tensor,  # [N] of entropy T - Z under the teacher's softmax over the negatives
    entropy: float,
) -> Tensor:  # [N]
    """KL(softmax T || softmax Z) of each row for entropy = 1, the cross-entropy (KL plus the teacher's entropy) for 0.

    With m = 1 - softmax(T) of the positive, r and r̂ the log-sum-exps over the whole row:
    r - E_T[Z] + entropy (E_T[T] - r̂) = (r - z) - entropy (r̂ - t) + m (mean + z - entropy t).
    """
    miss = torch.sigmoid(teacher_lse - teacher_positive)
    value = cross_entropy(lse, positive) + miss * (mean + positive)
    if entropy:
        return value - entropy * (cross_entropy(teacher_lse, teacher_positive) + miss * teacher_positive)
    return value + 0 * teacher_positive  # NaN where that is infinite, as a softmax's


def terms_of(
    rows: Tensor,  # [12, N] RowStat
    columns: Tensor | None,  # [6, N] ColumnStat of the columns of the positives; None: the row direction only
    scale: Tensor,  # []
    teacher_scale: Tensor | None,  # []
    cross_scale: Tensor | None,  # []
    plane: tuple[Tensor, Tensor] | None,  # (p [] or w [D], q [])
    pairs: Tensor,  # [] float64, negatives of this rank or, where ranks differ, their mean
    *,
    contrastive: bool,
    matching: str | None,  # "all", "hard" or None
    relational: bool,
    interactive: bool,  # "kl"; for "infonce" see similarity_rows
    entropy: float,
) -> dict[str, Tensor]:
    """The terms, each 0-dimensional; see simplclip.ops.similarity.op for their formulas."""
    out: dict[str, Tensor] = {}
    z = scale * rows[RowStat.DIAGONAL_Z]
    t = None if teacher_scale is None else teacher_scale * rows[RowStat.DIAGONAL_T]

    def both(by_row: Tensor, by_column: Tensor | None) -> Tensor:
        return by_row.mean() if by_column is None else 0.5 * (by_row.mean() + by_column.mean())

    if contrastive:
        by_column = None if columns is None else cross_entropy(columns[ColumnStat.LSE_Z], z)
        out["contrastive"] = both(cross_entropy(rows[RowStat.LSE_Z], z), by_column)
    if matching:
        weight, bias = plane
        positive = (rows[RowStat.DIAGONAL_L] if weight.dim() else weight * rows[RowStat.DIAGONAL_Z]) + bias
        if matching == "all":
            negative = rows[RowStat.MATCH].sum() / pairs.clamp(min=1).to(rows.dtype)
        else:
            negative = both(rows[RowStat.MATCH], None if columns is None else columns[ColumnStat.MATCH])
        out["pair_matching"] = 0.5 * (mismatch(positive).mean() + negative)
    if relational:
        by_row = divergence(rows[RowStat.LSE_Z], z, rows[RowStat.LSE_T], t, rows[RowStat.MEAN_Z], entropy)
        by_column = None
        if columns is not None:
            lse, teacher_lse, mean = (columns[i] for i in (ColumnStat.LSE_Z, ColumnStat.LSE_T, ColumnStat.MEAN_Z))
            by_column = divergence(lse, z, teacher_lse, t, mean, entropy)
        out["relational"] = both(by_row, by_column)
    if interactive:
        u, v = cross_scale * rows[RowStat.DIAGONAL_U], cross_scale * rows[RowStat.DIAGONAL_V]
        by_row = divergence(rows[RowStat.LSE_U], u, rows[RowStat.LSE_T], t, rows[RowStat.MEAN_U], entropy)
        by_column = None
        if columns is not None:
            lse, teacher_lse, mean = (columns[i] for i in (ColumnStat.LSE_V, ColumnStat.LSE_T, ColumnStat.MEAN_V))
            by_column = divergence(lse, v, teacher_lse, t, mean, entropy)
        out["interactive"] = both(by_row, by_column)
    return out


def merge_columns(parts: Tensor) -> Tensor:  # [W, 6, N] -> [6, N]
    """Statistics of the same columns over several groups of rows, as if over all those rows.

    Differentiable in the student's log-sum-exps and in the means; the weights of a mean are the teacher's softmax or those of
    "hard", which are constants.
    """

    def lse(part: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
        empty = (part == -torch.inf).all(0)
        total = torch.where(empty, -torch.inf, part.masked_fill(empty, 0).logsumexp(0))
        return total, (part.detach() - total.detach().masked_fill(empty, 0)).exp()

    out = {}
    out[ColumnStat.LSE_Z], share_z = lse(parts[:, ColumnStat.LSE_Z])
    out[ColumnStat.LSE_T], share_t = lse(parts[:, ColumnStat.LSE_T])
    out[ColumnStat.LSE_V], _ = lse(parts[:, ColumnStat.LSE_V])
    for mean, share in ((ColumnStat.MATCH, share_z), (ColumnStat.MEAN_Z, share_t), (ColumnStat.MEAN_V, share_t)):
        out[mean] = (share * parts[:, mean]).sum(0)
    return torch.stack([out[stat] for stat in sorted(out)])


def shifted_pair_matching(
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    weight: Tensor,  # [] or [D]
    bias: Tensor,  # []
    ids: Tensor | None,  # [N]
    text_ids: Tensor | None,  # [M]
    label_offset: int,
    shift: Tensor | int,  # [] int64
) -> Tensor:
    """Pair matching with one negative per row: two N·D gathers, so plain torch does."""
    n, m = image.shape[0], text.shape[0]
    x = image.to(accumulate_dtype(image.dtype)) * weight
    label = torch.arange(n, device=image.device) + label_offset
    other = (label + shift) % m
    matched = (x * text[label]).sum(1) + bias
    unmatched = F.softplus((x * text[other]).sum(1) + bias)
    keep = torch.ones_like(unmatched) * (m > 1)
    if ids is not None:
        keep = keep * (text_ids[other] != ids)
    return 0.5 * (mismatch(matched).mean() + (unmatched * keep).sum() / keep.sum().clamp(min=1))
