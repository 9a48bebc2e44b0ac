"""The tensors and options of a call of similarity_loss, and the slots of its statistics. Imports torch alone.

The matrices of a call, by name:

    student            Z = s x yᵀ, of image and text
    teacher            T = ŝ x̂ ŷᵀ, of the teacher's features
    image_to_teacher   U = s' x' ŷᵀ, of the student's images in the teacher's width and the teacher's texts
    teacher_to_text    V = s' x̂ y'ᵀ, of the teacher's images and the student's texts in the teacher's width
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

TERMS = ("contrastive", "pair_matching", "relational", "interactive", "sigmoid")
POSITIVES = ("drop", "ids", "sum")
INTERACTIVE = ("infonce", "kl")
DIVERGENCES = ("kl", "cross_entropy")

# The fields of a call whose gradients backward returns, in this order.
GRADIENTS = (
    "image", "text", "scale", "projected_image", "projected_text", "cross_scale", "sigmoid_weight", "sigmoid_bias",
)  # fmt: skip


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of stored rows for products in `dtype`: bfloat16 for float16, whose range exponentials leave."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


class RowStat(IntEnum):
    """Rows of the first result of similarity_loss_fwd: statistics of each row of the matrices over its negatives.

    Statistics that a call does not need are 0. LSE: log-sum-exp, -inf without negatives; MEAN: 0 without negatives.
    """

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    LSE_IMAGE_TO_TEACHER = 2
    MEAN_STUDENT = 3  # mean of (entropy T - Z) under the softmax of T
    MEAN_IMAGE_TO_TEACHER = 4  # mean of (entropy T - U) under the softmax of T
    DIAGONAL_STUDENT = 5  # the positive's similarity, unscaled: x y^T
    DIAGONAL_TEACHER = 6
    DIAGONAL_IMAGE_TO_TEACHER = 7
    DIAGONAL_TEACHER_TO_TEXT = 8
    SIGMOID = 9  # the row's share of the first sigmoid term
    SECOND_SIGMOID = 10


class ColumnStat(IntEnum):
    """Rows of the second result of similarity_loss_fwd: the same statistics of each column."""

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    LSE_TEACHER_TO_TEXT = 2
    MEAN_STUDENT = 3
    MEAN_TEACHER_TO_TEXT = 4


@dataclass
class SimilarityCall:
    """Arguments of forward. The dispatcher's schema and C++'s SimilarityCall have these fields in this order."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_image: Tensor | None = None  # [N, D̂]
    teacher_text: Tensor | None = None  # [M, D̂]
    teacher_scale: Tensor | None = None  # []
    projected_image: Tensor | None = None  # [N, D̂]; None: image
    projected_text: Tensor | None = None  # [M, D̂]; None: text
    cross_scale: Tensor | None = None  # [], the scale of image_to_teacher and teacher_to_text
    sigmoid_weight: Tensor | None = None  # [K], of the sigmoid terms in the softmax's sweep, see SigmoidCall
    sigmoid_bias: Tensor | None = None  # [K]
    sigmoid_negative: Tensor | None = None  # [K]
    sigmoid_positive: Tensor | None = None  # [K]
    image_share: Tensor | None = None  # [N]
    text_share: Tensor | None = None  # [M]
    ids: Tensor | None = None  # [N] int64
    text_ids: Tensor | None = None  # [M] int64
    label_offset: int = 0  # column of row 0's positive
    softmax: bool = False  # whether to compute the student's matrix and the statistics of its softmax
    columns: bool = False  # whether statistics of columns are needed
    drop_ids: bool = True  # whether pairs with equal ids drop out of the softmaxes
    relational: bool = False  # whether to compute means of the student's logits under the teacher's softmax
    interactive: bool = False  # whether to compute the same means of image_to_teacher and teacher_to_text
    entropy: float = 1.0  # 1: the means include the teacher's entropy; 0: they do not
    chunk: int = 0  # rows of a matrix in scratch at a time, on a GPU blocks of as many elements; see chunks.py
    stored_rows: int = 0  # rows of the matrices that forward keeps for backward: products, on a GPU exponentials

    @property
    def has_teacher(self) -> bool:
        return self.relational or self.interactive

    @property
    def has_teacher_to_text(self) -> bool:
        return self.interactive and self.columns

    @property
    def sigmoids(self) -> int:
        """The number of sigmoid terms, K."""
        return 0 if self.sigmoid_weight is None else self.sigmoid_weight.shape[0]

    @property
    def matrices(self) -> int:
        """The number of matrices of this call."""
        return self.softmax + self.has_teacher + self.interactive + self.has_teacher_to_text

    @property
    def keeps_exponentials(self) -> bool:
        """Whether a GPU may keep rows: exponentials are not enough for sigmoid terms and means, and ids need registers."""
        return self.softmax and self.matrices == 1 and not self.sigmoids and self.ids is None

    @property
    def student_image(self) -> Tensor:  # [N, D̂]
        """The student's image features in the teacher's width."""
        return self.image if self.projected_image is None else self.projected_image

    @property
    def student_text(self) -> Tensor:  # [M, D̂]
        return self.text if self.projected_text is None else self.projected_text


@dataclass
class SimilarityGradient(SimilarityCall):
    """Arguments of backward: those of forward, its results and the gradients of its results. All are given."""

    grad_rows: Tensor = None  # [11, N]
    grad_columns: Tensor = None  # [5, M]
    row_stats: Tensor = None  # [11, N] RowStat
    column_stats: Tensor = None  # [5, M] ColumnStat
    stored: Tensor = None  # [matrices, stored_rows, M]
    need_image: bool = True
    need_text: bool = True


@dataclass
class RowsCall:
    """Arguments of similarity_rows: softmaxes of the rows of scale query keysᵀ, with constant keys."""

    query: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64, of the keys
    label_offset: int
    attend: bool  # whether to return the mean keys, which backward needs
    chunk: int

    @property
    def contrastive(self) -> SimilarityCall:
        """The call of similarity_loss_fwd whose student's matrix is scale query keysᵀ."""
        options: dict[str, Any] = {
            "ids": self.ids,
            "text_ids": self.text_ids,
            "label_offset": self.label_offset,
            "chunk": self.chunk,
        }
        return SimilarityCall(self.query, self.keys, self.scale, softmax=True, **options)


@dataclass
class RowsGradient:
    """Arguments of similarity_rows_bwd."""

    grad: Tensor  # [2, N]
    query: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    mean_keys: Tensor  # [N, D]
    label_offset: int


@dataclass
class SigmoidCall:
    """Arguments of similarity_sigmoid: K sigmoid terms of l = weight x yᵀ + bias, which share one sweep.

    Term k is negative[k] times the sum of softplus(l) over the negatives, plus positive[k] times the sum of share
    softplus(-l) over the positives. With image_share, pairs with equal ids are positives too, and the share of (i, j) is
    image_share[i] + text_share[j]. Without shares, equal ids are neither positives nor negatives, and the share is 1.
    """

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    weight: Tensor  # [K]
    bias: Tensor  # [K]
    negative: Tensor  # [K]
    positive: Tensor  # [K]
    mix: Tensor  # [K]: weights of the terms in the sum whose gradient is computed
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    image_share: Tensor | None  # [N]
    text_share: Tensor | None  # [M]
    label_offset: int  # column of row 0's positive
    chunk: int  # rows of the matrix in scratch at a time
    gradient: bool  # whether to compute gradients with the values
    need_image: bool
    need_text: bool


@dataclass
class TermsCall:
    """Arguments of similarity_terms: the contrastive term and the sums of K sigmoid terms from the statistics of a sweep."""

    rows: Tensor  # [11, N] RowStat
    columns: Tensor | None  # [5, N] ColumnStat of the columns of the positives; None: the row direction only
    scale: Tensor  # []
    margin: float
    sigmoids: int  # K


@dataclass
class TermsGradient:
    """Arguments of similarity_terms_bwd."""

    grad: Tensor  # [1 + K]
    rows: Tensor
    columns: Tensor | None
    scale: Tensor
    margin: float
    sigmoids: int
