"""Terms of similarity_loss from the statistics of the similarity matrices, in plain torch; autograd differentiates them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.similarity.call import ColumnStat


def mismatch(l: Tensor) -> Tensor:
    """Returns softplus(-l) for the logits l of positives. NaN where l is infinite, even if the softplus would be 0."""
    return 0 * l.detach() - F.logsigmoid(l)  # F.softplus is exact to e^-20 only


def cross_entropy(lse: Tensor, positive: Tensor) -> Tensor:
    """Returns -log softmax of the positive z as softplus(lse - z), lse over the negatives: exact for well matched pairs too.

    The result is NaN where the positive is infinite, as in F.cross_entropy, though the softplus may be 0.
    """
    return 0 * positive.detach() - F.logsigmoid(positive - lse)


def contrastive(lse: Tensor, column_lse: Tensor | None, positive: Tensor) -> Tensor:  # [N] each -> []
    """Returns the mean over rows, and columns if given, of the cross-entropies to the positives."""
    return cross_entropy(lse if column_lse is None else torch.stack([lse, column_lse]), positive).mean()


def pair_matching(unmatched: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor, negatives: Tensor | int) -> Tensor:
    """Returns ½ [mean softplus(−l) of the positives + mean softplus(l) of the negatives], l = p S + q.

    unmatched: [N] sums of softplus(l) over each row's negatives. negatives: the number of all negatives, at least 1.
    """
    return 0.5 * mismatch(torch.addcmul(bias, weight, diagonal)).mean() + unmatched.sum() * (0.5 / negatives)


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
