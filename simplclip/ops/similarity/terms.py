"""From the statistics of the similarity matrices to the terms of similarity_loss: vectors of N, plain torch, by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import ColumnStat as Column
from simplclip.ops.similarity.call import RowStat as Row


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
    z = scale * rows[Row.DIAGONAL_STUDENT]
    t = None if teacher_scale is None else teacher_scale * rows[Row.DIAGONAL_TEACHER]

    def both(by_row: Tensor, by_column: Tensor | None) -> Tensor:
        return by_row.mean() if by_column is None else 0.5 * (by_row.mean() + by_column.mean())

    if contrastive:
        by_column = None if columns is None else cross_entropy(columns[Column.LSE_STUDENT], z)
        out["contrastive"] = both(cross_entropy(rows[Row.LSE_STUDENT], z), by_column)
    if matching:
        weight, bias = plane
        positive = (rows[Row.DIAGONAL_HADAMARD] if weight.dim() else weight * rows[Row.DIAGONAL_STUDENT]) + bias
        if matching == "all":
            negative = rows[Row.PAIR_MATCHING].sum() / pairs.clamp(min=1).to(rows.dtype)
        else:
            negative = both(rows[Row.PAIR_MATCHING], None if columns is None else columns[Column.PAIR_MATCHING])
        out["pair_matching"] = 0.5 * (mismatch(positive).mean() + negative)
    if relational:
        by_row = divergence(rows[Row.LSE_STUDENT], z, rows[Row.LSE_TEACHER], t, rows[Row.MEAN_STUDENT], entropy)
        by_column = None
        if columns is not None:
            lse, teacher_lse, mean = (columns[i] for i in (Column.LSE_STUDENT, Column.LSE_TEACHER, Column.MEAN_STUDENT))
            by_column = divergence(lse, z, teacher_lse, t, mean, entropy)
        out["relational"] = both(by_row, by_column)
    if interactive:
        u, v = cross_scale * rows[Row.DIAGONAL_IMAGE_TO_TEACHER], cross_scale * rows[Row.DIAGONAL_TEACHER_TO_TEXT]
        by_row = divergence(
            rows[Row.LSE_IMAGE_TO_TEACHER], u, rows[Row.LSE_TEACHER], t, rows[Row.MEAN_IMAGE_TO_TEACHER], entropy
        )
        by_column = None
        if columns is not None:
            lse, teacher_lse, mean = (
                columns[i] for i in (Column.LSE_TEACHER_TO_TEXT, Column.LSE_TEACHER, Column.MEAN_TEACHER_TO_TEXT)
            )
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
    out[Column.LSE_STUDENT], share_z = lse(parts[:, Column.LSE_STUDENT])
    out[Column.LSE_TEACHER], share_t = lse(parts[:, Column.LSE_TEACHER])
    out[Column.LSE_TEACHER_TO_TEXT], _ = lse(parts[:, Column.LSE_TEACHER_TO_TEXT])
    for mean, share in (
        (Column.PAIR_MATCHING, share_z),
        (Column.MEAN_STUDENT, share_t),
        (Column.MEAN_TEACHER_TO_TEXT, share_t),
    ):
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
