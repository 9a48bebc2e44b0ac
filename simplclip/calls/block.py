"""The tensors and options of a call of simplified_block. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from simplclip.calls.fields import Mutated, Strided


@dataclass(frozen=True)
class BlockCall:
    """Arguments of simplclip::simplified_block_fwd, as of simplified_block.

    The results are out [B, L, C], and for backward [q|k], h, lse and av: see BlockGradient.
    """

    x: Tensor  # [B, L, C]
    norm_weight: Tensor  # [C]
    norm_bias: Tensor | None  # [C]
    qk_weight: Strided  # [2C, C]
    fc1_weight: Strided  # [F, C]
    fc1_bias: Tensor  # [F]
    fc2_weight: Strided  # [C, F]
    fc2_bias: Tensor  # [C]
    alpha: Tensor  # [H]
    beta: Tensor  # [H]
    gamma: Tensor  # [H]
    attention_gain: Tensor  # [], in the dtype of sums
    mlp_gain: Tensor  # [], in the dtype of sums
    value_weight: Strided | None  # [C, C]
    output_weight: Strided | None  # [C, C]
    lengths: Tensor | None  # [B] int32
    norm: str
    eps: float
    act: str
    scale: float
    causal: bool
    keep: bool  # whether to return [q|k], h and av; backward computes them again otherwise


class Needed(NamedTuple):
    """Whether the gradient of a tensor of a BlockCall is needed, in the order of its fields."""

    x: bool
    norm_weight: bool
    norm_bias: bool
    qk_weight: bool
    fc1_weight: bool
    fc1_bias: bool
    fc2_weight: bool
    fc2_bias: bool
    alpha: bool
    beta: bool
    gamma: bool
    attention_gain: bool
    mlp_gain: bool
    value_weight: bool
    output_weight: bool


@dataclass(frozen=True)
class BlockGradient(BlockCall):
    """Arguments of simplclip::simplified_block_bwd: those of forward, its results, and grad of out.

    Overwrites h by its gradient. The results are the gradients in the order of Needed.
    """

    grad: Tensor  # [B, L, C]
    qk: Tensor  # [B L, 2C], or empty
    h: Mutated  # [B L, F] the hidden layer before its activation, or empty
    lse: Tensor  # [B, H, L]
    av: Tensor  # [B, L, H, K] as shaped_attention's, or empty
    need: list[bool]  # Needed; the result is empty for a gradient that is not needed
