"""What a call of similarity_loss is: its tensors, its options, and the slots of its statistics. Imports torch alone.

The matrices of a call, by name:

    student            Z = s x yᵀ, of image and text
    teacher            T = ŝ x̂ ŷᵀ, of the teacher's features
    image_to_teacher   U = s' x' ŷᵀ, of the student's images in the teacher's width and the teacher's texts
    teacher_to_text    V = s' x̂ y'ᵀ, of the teacher's images and the student's texts in the teacher's width
    hadamard           (x w) yᵀ, where the hyperplane of pair matching has a weight for each feature
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

TERMS = ("contrastive", "pair_matching", "relational", "interactive")
NEGATIVES = ("all", "shift", "hard")
INTERACTIVE = ("infonce", "kl")
DIVERGENCES = ("kl", "cross_entropy")

NO_NEGATIVES, ALL_NEGATIVES, HARD_NEGATIVES = 0, 1, 2  # what the sweep has to do with them


class RowStat(IntEnum):
    """Rows of the first result of similarity_loss_fwd: what a row of the matrices is reduced to, over its negatives.

    What a call does not ask for is 0. lse: log-sum-exp (-inf without negatives); mean: 0 without negatives.
    """

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    LSE_IMAGE_TO_TEACHER = 2
    PAIR_MATCHING = 3  # all negatives: sum of softplus(l); hard ones: its mean under the softmax of the student
    MEAN_STUDENT = 4  # mean of (entropy T - Z) under the softmax of T
    MEAN_IMAGE_TO_TEACHER = 5  # mean of (entropy T - U) under the softmax of T
    DIAGONAL_STUDENT = 6  # the positive's similarity, unscaled: x y^T
    DIAGONAL_HADAMARD = 7
    DIAGONAL_TEACHER = 8
    DIAGONAL_IMAGE_TO_TEACHER = 9
    DIAGONAL_TEACHER_TO_TEXT = 10
    NEGATIVES = 11  # their number


class ColumnStat(IntEnum):
    """Rows of the second result of similarity_loss_fwd: the same for the columns."""

    LSE_STUDENT = 0
    LSE_TEACHER = 1
    LSE_TEACHER_TO_TEXT = 2
    PAIR_MATCHING = 3  # hard negatives only
    MEAN_STUDENT = 4
    MEAN_TEACHER_TO_TEXT = 5


@dataclass
class SimilarityCall:
    """Forward's arguments. The dispatcher's schema has these fields in this order, and C++'s SimilarityCall too."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_image: Tensor | None  # [N, D̂]
    teacher_text: Tensor | None  # [M, D̂]
    teacher_scale: Tensor | None  # []
    projected_image: Tensor | None  # [N, D̂], where it is not image itself
    projected_text: Tensor | None  # [M, D̂], where it is not text itself
    cross_scale: Tensor | None  # [] of image_to_teacher and teacher_to_text
    plane_weight: Tensor | None  # [] or [D]
    plane_bias: Tensor | None  # []
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    label_offset: int  # the column of row 0's positive
    softmax: bool  # statistics of the student's softmax
    columns: bool  # of columns too
    negatives: int  # of pair matching: NO_NEGATIVES, ALL_NEGATIVES or HARD_NEGATIVES
    relational: bool  # means of the student under the teacher's softmax
    interactive: bool  # image_to_teacher and teacher_to_text, and their means under the teacher's softmax
    entropy: float  # 1: the means have the teacher's entropy in them; 0: they do not
    chunk: int  # rows of a matrix in scratch at a time
    stored_rows: int  # rows of the matrices that forward keeps for backward

    @property
    def has_student(self) -> bool:
        return bool(self.softmax or self.negatives)

    @property
    def has_teacher(self) -> bool:
        return self.relational or self.interactive

    @property
    def has_teacher_to_text(self) -> bool:
        return self.interactive and self.columns

    @property
    def has_hadamard(self) -> bool:
        return bool(self.negatives) and self.plane_weight.dim() == 1

    @property
    def matrices(self) -> int:
        """How many there are, but for the hadamard one, which is never stored."""
        return self.has_student + self.has_teacher + self.interactive + self.has_teacher_to_text

    @property
    def student_image(self) -> Tensor:  # [N, D̂]
        """The student's images in the teacher's width."""
        return self.image if self.projected_image is None else self.projected_image

    @property
    def student_text(self) -> Tensor:  # [M, D̂]
        return self.text if self.projected_text is None else self.projected_text


@dataclass
class SimilarityGradient(SimilarityCall):
    """Backward's arguments: forward's, its results and the gradients that come to them."""

    grad_rows: Tensor  # [12, N]
    grad_columns: Tensor  # [6, M]
    row_stats: Tensor  # [12, N] RowStat
    column_stats: Tensor  # [6, M] ColumnStat
    stored: Tensor  # [matrices, stored_rows, M]
    need_image: bool
    need_text: bool


@dataclass
class RowsCall:
    """Arguments of similarity_rows: row softmaxes of scale query keysᵀ, whose keys are constants."""

    query: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64, of the keys
    label_offset: int
    attend: bool  # the mean keys too, which backward needs
    chunk: int


@dataclass
class RowsGradient:
    """Arguments of similarity_rows_bwd."""

    grad: Tensor  # [2, N]
    query: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    mean_keys: Tensor  # [N, D]
    label_offset: int
