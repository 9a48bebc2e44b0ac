"""The tensors and options of a call of feature_loss. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FeatureCall:
    """Arguments of forward, whose results are the loss [] and the inverse norms [2, N], or [2, 0] if not `normalize`."""

    student: Tensor  # [N, D]
    teacher: Tensor  # [N, D], of any float dtype
    smooth: bool  # smooth L1, else squares
    beta: float
    normalize: bool


@dataclass(frozen=True)
class FeatureGradient(FeatureCall):
    """Arguments of backward."""

    grad: Tensor  # []
    inv_norms: Tensor  # [2, N] of student and teacher, or [2, 0]
