"""Terms of similarity_loss from the statistics of the similarity matrices, in plain torch; autograd differentiates them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall


def mismatch(l: Tensor) -> Tensor:
    """Returns softplus(-l) for the logits l of positives. NaN where l is infinite, even if the softplus would be 0."""
    return 0 * l.detach() - F.logsigmoid(l)  # F.softplus is exact to e^-20 only


def cross_entropy(lse: Tensor, positive: Tensor) -> Tensor:
    """Returns -log softmax of the positive z as softplus(lse - z), lse over the negatives: exact for well matched pairs too.

    The result is NaN where the positive is infinite, as in F.cross_entropy, though the softplus may be 0.
    """
    margin = positive - lse
    if backends.forced() == "reference":
        # The margin is inf without negatives, where logsigmoid has no second derivative; beyond 1000 the result is 0 anyway.
        margin = margin.clamp(max=1000)
    return 0 * positive.detach() - F.logsigmoid(margin)


def divergence(
    lse: Tensor,  # [N] of the student's logits, over the negatives
    positive: Tensor,  # [N]
    teacher_lse: Tensor,  # [N]
    teacher_positive: Tensor,  # [N]
    mean: Tensor,  # [N] of entropy T - Z under the teacher's softmax over the negatives
    entropy: float,
) -> Tensor:  # [N]
    """Returns each row's KL(softmax T || softmax Z) for entropy = 1, its cross-entropy (KL plus the teacher's entropy) for 0.

    With m = 1 - softmax(T) of the positive, r and r̂ the log-sum-exps over the whole row:
    r - E_T[Z] + entropy (E_T[T] - r̂) = (r - z) - entropy (r̂ - t) + m (mean + z - entropy t).
    """
    miss = torch.sigmoid(teacher_lse - teacher_positive)
    value = cross_entropy(lse, positive) + miss * (mean + positive)
    if entropy:
        return value - entropy * (cross_entropy(teacher_lse, teacher_positive) + miss * teacher_positive)
    return value + 0 * teacher_positive  # NaN if the teacher's positive is infinite, as a softmax would give


def terms_of(
    call: SimilarityCall,
    rows: Tensor,  # [11, N] RowStat
    columns: Tensor | None,  # [5, N] ColumnStat of the columns of the positives; None: the row direction only
) -> dict[str, Tensor]:
    """Returns the terms that need a teacher, each 0-dimensional; see simplclip.ops.similarity_loss for their formulas."""
    out: dict[str, Tensor] = {}
    student = call.scale * rows[RowStat.DIAGONAL_STUDENT]
    teacher = call.teacher_scale * rows[RowStat.DIAGONAL_TEACHER] if call.has_teacher else None

    def both(by_row: Tensor, by_column: Tensor | None) -> Tensor:
        return by_row.mean() if by_column is None else 0.5 * (by_row.mean() + by_column.mean())

    def to_teacher(stats: Tensor | None, lse: int, mean: int, lse_teacher: int, positive: Tensor) -> Tensor | None:
        if stats is None:
            return None
        return divergence(stats[lse], positive, stats[lse_teacher], teacher, stats[mean], call.entropy)

    if call.relational:
        by_row = to_teacher(rows, RowStat.LSE_STUDENT, RowStat.MEAN_STUDENT, RowStat.LSE_TEACHER, student)
        by_column = to_teacher(columns, ColumnStat.LSE_STUDENT, ColumnStat.MEAN_STUDENT, ColumnStat.LSE_TEACHER, student)
        out["relational"] = both(by_row, by_column)
    if call.interactive:
        of_image = call.cross_scale * rows[RowStat.DIAGONAL_IMAGE_TO_TEACHER]
        of_text = call.cross_scale * rows[RowStat.DIAGONAL_TEACHER_TO_TEXT]
        by_row = to_teacher(rows, RowStat.LSE_IMAGE_TO_TEACHER, RowStat.MEAN_IMAGE_TO_TEACHER, RowStat.LSE_TEACHER, of_image)
        by_column = to_teacher(
            columns, ColumnStat.LSE_TEACHER_TO_TEXT, ColumnStat.MEAN_TEACHER_TO_TEXT, ColumnStat.LSE_TEACHER, of_text
        )
        out["interactive"] = both(by_row, by_column)
    return out


def merge_columns(parts: Tensor) -> Tensor:  # [W, 5, N] -> [5, N]
    """Merges statistics of the same columns, each over the rows of one rank, into the statistics over the rows of all ranks.

    Differentiable in the student's log-sum-exps and in the means, whose weights are the teacher's softmax, a constant.
    """

    def lse(part: Tensor) -> tuple[Tensor, Tensor]:  # [W, N] -> [N], [W, N] shares
        empty = (part == -torch.inf).all(0)
        total = torch.where(empty, -torch.inf, part.masked_fill(empty, 0).logsumexp(0))
        return total, (part.detach() - total.detach().masked_fill(empty, 0)).exp()

    softmaxes = (ColumnStat.LSE_STUDENT, ColumnStat.LSE_TEACHER, ColumnStat.LSE_TEACHER_TO_TEXT)
    found = {stat: lse(parts[:, stat]) for stat in softmaxes}
    out = {stat: total for stat, (total, _) in found.items()}
    share = found[ColumnStat.LSE_TEACHER][1]
    out |= {mean: (share * parts[:, mean]).sum(0) for mean in (ColumnStat.MEAN_STUDENT, ColumnStat.MEAN_TEACHER_TO_TEXT)}
    return torch.stack([out[stat] for stat in ColumnStat])
