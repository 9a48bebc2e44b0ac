"""What a call of similarity_loss asks for: its options and the slots of its statistics."""

from __future__ import annotations

from enum import IntEnum


class RowStat(IntEnum):
    """Rows of the first result of similarity_loss_fwd: what a row of the matrices is reduced to, over its negatives.

    What a call does not ask for is 0. lse: log-sum-exp (-inf without negatives); mean: 0 without negatives.
    """

    LSE_Z = 0  # lse of Z
    LSE_T = 1
    LSE_U = 2
    MATCH = 3  # "all": sum of softplus(l); "hard": its mean under the softmax of Z
    MEAN_Z = 4  # mean of (entropy T - Z) under the softmax of T
    MEAN_U = 5  # mean of (entropy T - U) under the softmax of T
    DIAGONAL_Z = 6  # the positive's similarity, unscaled: x y^T
    DIAGONAL_L = 7  # (x w) y^T, only with a hadamard plane
    DIAGONAL_T = 8
    DIAGONAL_U = 9
    DIAGONAL_V = 10
    NEGATIVES = 11  # their number


class ColumnStat(IntEnum):
    """Rows of the second result of similarity_loss_fwd: the same for the columns."""

    LSE_Z = 0
    LSE_T = 1
    LSE_V = 2
    MATCH = 3  # "hard" only
    MEAN_Z = 4
    MEAN_V = 5


NEGATIVES_ALL, NEGATIVES_HARD = 1, 2
