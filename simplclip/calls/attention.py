"""The tensors and options of a call of shaped_attention. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simplclip.calls.fields import Mutated, Strided


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of simplclip::shaped_attention_fwd and of the backends' functions for it.

    The results are out [B, L, H, K], the log-sum-exps lse [B, H, L], and av: see AttentionGradient.
    """

    q: Strided  # [B, L, H, K]
    k: Strided  # [B, L, H, K]
    v: Strided  # [B, L, H, K]
    gains: Tensor  # [3, H] alpha, beta, gamma, in the dtype of sums
    lengths: Tensor | None  # [B] int32, 0..L: the valid tokens
    scale: float
    causal: bool


@dataclass(frozen=True)
class AttentionGradient(AttentionCall):
    """Arguments of simplclip::shaped_attention_bwd: those of forward, its lse and av, and grad.

    grad is the gradient of out. The results are the gradients of q, k, v and gains.
    """

    grad: Strided  # [B, L, H, K]
    lse: Tensor  # [B, H, L]
    av: Tensor  # [B, L, H, K] softmax(q k^T scale) v, or empty if the backend does not need it


@dataclass(frozen=True)
class AttentionInto(AttentionGradient):
    """Arguments of the backends' functions for backward: the op's, and memory for dq, dk and dv.

    The functions overwrite dq, dk and dv, and return the gains' gradients [3, H].
    """

    dq: Mutated  # [B, L, H, K]
    dk: Mutated  # [B, L, H, K]
    dv: Mutated  # [B, L, H, K]
