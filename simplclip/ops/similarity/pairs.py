"""The pairs of a batch, and the terms of a loss that are computed of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """A teacher's features of the pairs, and its scale, which not every term needs."""

    image: Tensor  # [N, D̂]
    text: Tensor  # [M, D̂]
    scale: Tensor | None = None  # []


@dataclass(frozen=True)
class Pairs:
    """Rows of images, and columns of texts among which each row has a positive."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    bias: Tensor | None = None  # []
    ids: Tensor | None = None  # [N] int64
    teacher: Teacher | None = None
    text_ids: Tensor | None = None  # [M] int64
    label_offset: int = 0  # column of row 0's positive

    def swapped(self) -> Pairs:
        """Returns new pairs with image and text exchanged, those of the teacher too."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Teacher(teacher.text, teacher.image, teacher.scale)
        return replace(self, image=self.text, text=self.image, teacher=teacher)

    def against(self, columns: Pairs) -> Pairs:
        """Returns new pairs of these images and the texts of `columns`, the teacher's too."""
        teacher = self.teacher
        if teacher is not None and columns.teacher is not None:
            teacher = replace(teacher, text=columns.teacher.text)
        return replace(self, text=columns.text, teacher=teacher)


@dataclass(frozen=True)
class Settings:
    """What is computed of pairs, and how: arguments of similarity_loss, checked."""

    terms: tuple[str, ...]
    weights: Mapping[str, float] | None = None  # of the terms; with them, their sum is computed
    plane: tuple[Tensor, Tensor] | None = None  # [] and []; if a term needs it
    divergence: str = "kl"
    symmetric: bool = True
    group: torch.distributed.ProcessGroup | None = None
    scratch_bytes: int | None = None
    store_bytes: int | None = None


class Values(NamedTuple):
    """The terms of a loss, each []."""

    total: Tensor | None  # with weights, the weighted sum, which alone has a gradient
    terms: dict[str, Tensor]  # by name, without their weights
