"""The tensors and options of a call of similarity_loss, and the slots of its statistics.

Imports torch alone.

The matrices of a call are the student's logits Z = s x yᵀ and the teacher's logits T = ŝ x̂ ŷᵀ. The
plane of pair matching is a function of the student's similarities S = x yᵀ: l = p S + q.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

DIVERGENCES = ("kl", "cross_entropy")


class RowStat(IntEnum):
    """Rows of the first result of similarity_loss_fwd: statistics of each row of the matrices over
    its negatives.

    Statistics that a call does not need are 0. LSE: log-sum-exp, -inf without negatives; MEAN: 0
    without negatives.
    """

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    MEAN = 2  # mean of (entropy T - Z) under the softmax of T
    DIAGONAL_STUDENT = 3  # the positive's similarity, unscaled: x y^T
    DIAGONAL_TEACHER = 4
    PAIR_MATCHING = 5  # sum of softplus(p S + q)


class ColumnStat(IntEnum):
    """Rows of the second result of similarity_loss_fwd: the same statistics of each column."""

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    MEAN = 2


class SigmoidRow(IntEnum):
    """Rows of a SigmoidCall's sigmoids, the numbers of its terms; see SigmoidCall."""

    WEIGHT = 0
    BIAS = 1
    NEGATIVE = 2
    POSITIVE = 3
    MIX = 4  # the term's weight in the sum that has the gradient


@dataclass
class SimilarityCall:
    """Arguments of simplclip::similarity_loss_fwd: a sweep of the matrices, and terms of it.

    The terms are contrastive if `contrastive`, relational with a teacher, and pair matching with a
    plane. The results are the loss [], which is their weighted sum; the terms [T], or [0] if there
    is one, of weight 1; and for backward the statistics of rows [6, N] (RowStat) and columns [3, M]
    (ColumnStat), what statistics.terms returns, the columns' of each rank's rows [W, 3, N] with a
    group, and stored products [matrices, stored_rows, M].

    A backend's similarity_loss_fwd returns rows, columns and stored products. One that has also
    similarity_terms_fwd and similarity_terms_bwd returns all results by them, without a group.
    """

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_image: Tensor | None  # [N, D̂]; with a teacher, T's statistics and the mean are computed
    teacher_text: Tensor | None  # [M, D̂]
    teacher_scale: Tensor | None  # []
    plane_weight: Tensor | None  # [] p of pair matching, if it joins this sweep
    plane_bias: Tensor | None  # [] q
    ids: Tensor | None  # [N] int64: ids[i] = text_ids[j], except a positive's, is no negative
    text_ids: Tensor | None  # [M] int64
    share: Tensor | None  # [] `negative_share` with ids
    label_offset: int  # column of row 0's positive
    columns: bool  # whether both directions count, and statistics of columns are needed
    entropy: float  # 1: the means include the teacher's entropy; 0: they do not
    chunk: int  # rows of a matrix in scratch at a time, on a GPU blocks of as many elements
    stored_rows: int  # the first rows, whose products x yᵀ forward keeps for backward; 0 on a GPU
    contrastive: bool
    contrastive_weight: float
    relational_weight: float
    pair_matching_weight: float
    group: str  # the name of a process group whose ranks exchange statistics of columns; "": none

    @property
    def has_teacher(self) -> bool:
        """Whether the call has a teacher's features, and so a second matrix."""
        return self.teacher_image is not None

    @property
    def matrices(self) -> int:
        """The number of similarity matrices: 1, or 2 with a teacher."""
        return 2 if self.has_teacher else 1

    @cached_property
    def plane(self) -> Tensor | None:
        """p and q of pair matching [2], if it is asked for."""
        if self.plane_weight is None or self.plane_bias is None:
            return None
        return torch.stack([self.plane_weight, self.plane_bias])

    @property
    def weights(self) -> list[float]:
        """The weights of the terms that the call has."""
        weights = [self.contrastive_weight] if self.contrastive else []
        if self.has_teacher:
            weights.append(self.relational_weight)
        if self.plane_weight is not None:
            weights.append(self.pair_matching_weight)
        return weights

    @property
    def negative_share(self) -> Tensor | float:
        """0.5 over the number of all negatives, at least 1."""
        if self.share is not None:
            return self.share
        return 0.5 / max(1, self.image.shape[0] * (self.text.shape[0] - 1))


@dataclass
class TermsGradient(SimilarityCall):
    """Arguments of simplclip::similarity_loss_bwd: forward's, its results and their gradients.

    The results are d_image, d_text (without rows where not needed), d_scale [] and d_plane [2].
    """

    grad_loss: Tensor | None  # []
    grad_terms: Tensor | None  # [T]
    row_stats: Tensor  # [6, N] RowStat
    column_stats: Tensor  # [3, M] ColumnStat
    excess: Tensor  # see statistics.terms
    parts: Tensor  # [W, 3, N], or [0]
    stored: Tensor  # [matrices, stored_rows, M]
    need_image: bool
    need_text: bool


@dataclass
class SimilarityGradient(TermsGradient):
    """Arguments of a backend's similarity_loss_bwd, beside them the gradients of the statistics.

    The results are those of TermsGradient as far as they depend on the statistics.
    """

    grad_rows: Tensor  # [6, N], of the RowStat's
    grad_columns: Tensor  # [3, M]


@dataclass
class SigmoidCall:
    """Arguments of similarity_sigmoid: K sigmoid terms of l = weight x yᵀ + bias, which share one
    sweep.

    A term is negative times the sum of softplus(l) over the negatives, plus positive times the sum
    of softplus(-l) over the positives. Pairs with equal ids that are not the positive are neither.
    """

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    sigmoids: Tensor  # [5, K] SigmoidRow
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    label_offset: int  # column of row 0's positive
    chunk: int  # rows of the matrix in scratch at a time
    gradient: bool  # whether to compute gradients with the values
    need_image: bool
    need_text: bool
