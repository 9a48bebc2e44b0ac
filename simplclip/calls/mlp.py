"""The tensors and options of a call of parallel_mlp, and of its second half.

Imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simplclip.calls.fields import Mutated, Strided


@dataclass(frozen=True)
class MlpCall:
    """Arguments of simplclip::parallel_mlp_fwd.

    The results are out [T, C_out] and h, the hidden layer before its activation, [T, F], or [0, F]
    unless `keep`.
    """

    x: Strided  # [T, C]
    fc1_weight: Strided  # [F, C]
    fc1_bias: Tensor | None  # [F]
    fc2_weight: Strided  # [C_out, F]
    fc2_bias: Tensor | None  # [C_out]
    act: str
    keep: bool  # whether to return the hidden layer, for backward


@dataclass(frozen=True)
class MlpGradient:
    """Arguments of simplclip::parallel_mlp_bwd; h, from forward, is overwritten by its gradient.

    The results are the gradients of x, fc1_weight, fc1_bias, fc2_weight and fc2_bias.
    """

    grad: Tensor  # [T, C_out]
    h: Mutated  # [T, F]
    x: Strided  # [T, C]
    fc1_weight: Strided  # [F, C]
    fc2_weight: Strided  # [C_out, F]
    act: str
    need: list[bool]  # of x, fc1_weight, fc1_bias, fc2_weight, fc2_bias; the others are empty


@dataclass(frozen=True)
class HiddenCall:
    """Arguments of the backends' functions for forward, from the hidden layer before its activation
    to the output.
    """

    h: Tensor  # [T, F]
    weight: Tensor  # [C, F]
    bias: Tensor | None  # [C], contiguous
    act: str
    out: Mutated  # [T, C], its rows with any stride
    accumulate: bool  # whether to add to out


@dataclass(frozen=True)
class HiddenGradient:
    """Arguments of the backends' functions for backward, which return the gradient of the weight
    [C, F] or [0, F].
    """

    grad: Tensor  # [T, C]
    h: Mutated  # [T, F], replaced by its gradient
    weight: Tensor  # [C, F]
    act: str
    need_weight: bool
