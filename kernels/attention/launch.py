"""Launchers of the Triton kernels of shaped_attention, terms.py."""

import torch
import triton
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.kernels.attention.terms import (
    Heads,
    _shaped_attention_gradients_kernel,
    _shaped_attention_terms_kernel,
)
from simplclip.kernels.runtime import launch

ELEMENTS = 1024  # of a block
# so a thread has 8 elements, in backward of six tensors at a time; with 16 the compiler spills
WARPS = 4


def tile(width: int) -> dict[str, int]:
    """Returns a kernel's block, ROWS tokens by COLUMNS, and num_warps, for heads of a width."""
    columns = max(16, triton.next_power_of_2(width))
    return {"ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns, "num_warps": WARPS}


def _heads(*tensors: Tensor) -> list[Heads]:  # [B, L, H, K]
    """Returns tensors with contiguous rows as arguments of kernels."""
    return [Heads(t, *t.stride()[:3]) for t in tensors]


def shaped_attention_terms(call: AttentionCall, av: Tensor, out: Tensor) -> None:
    """Writes alpha v + beta A v − gamma C v to `out` [B, L, H, K], and 0 at padded tokens.

    av: A v = softmax(q kᵀ scale) v, [B, L, H, K]; it may hold anything at padded tokens. C v: the
    mean of v over the keys that a query sees.
    """
    batch, tokens, heads, width = call.q.shape
    with torch.cuda.device_of(call.q):
        launch(
            _shaped_attention_terms_kernel,
            batch * heads,
            *_heads(call.v, av, out),
            *(call.gains, call.lengths, tokens, heads, width),
            CAUSAL=call.causal,
            **tile(width),
        )


def shaped_attention_gradients(
    call: AttentionInto, ordinary: tuple[Tensor, Tensor, Tensor], sign: int
) -> Tensor:
    """Overwrites call.dq, call.dk and call.dv; returns the gains' gradients [3, H].

    ordinary: the gradients of q, k and v [B, L, H, K] of ordinary attention, arbitrary at padding.
    sign: a factor of dq. call.av must hold A v.
    """
    batch, tokens, heads, width = call.q.shape
    parts = torch.empty(3, batch, heads, dtype=torch.float32, device=call.q.device)
    with torch.cuda.device_of(call.q):
        launch(
            _shaped_attention_gradients_kernel,
            batch * heads,
            *_heads(call.grad, call.v, call.av, *ordinary, call.dq, call.dk, call.dv),
            *(parts, call.gains, call.lengths, tokens, heads, width, float(sign)),
            CAUSAL=call.causal,
            **tile(width),
        )
    return parts.sum(1)
