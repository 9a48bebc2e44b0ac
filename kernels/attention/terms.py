"""Kernels of the terms that shaped_attention adds to the softmax attention of another library.

They are bound by memory. A program processes the tokens of one head of one sequence in blocks.
Each tensor is read once, but one whose sum over all tokens is needed first is read again, from the
cache if it is still there. Causal sums are carried from block to block.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """A tensor [B, L, H, K] with contiguous rows, and its other strides."""

    first: Tensor
    batch: int
    token: int
    head: int


@triton.jit
def _pointers(heads, tensor, rows, columns):
    """Returns pointers [ROWS, COLUMNS] to tokens of the program's head, of a tensor of Heads."""
    program = tl.program_id(0)
    head = (
        tensor.first
        + (program // heads).to(tl.int64) * tensor.batch
        + (program % heads).to(tl.int64) * tensor.head
    )
    return head + rows.to(tl.int64)[:, None] * tensor.token + columns[None, :]


@triton.jit
def _load(heads, tensor, rows, columns, inside):
    """Loads tokens of the program's head in float32, [ROWS, COLUMNS]; 0 where not inside."""
    return tl.load(_pointers(heads, tensor, rows, columns), inside, 0.0).to(tl.float32)


@triton.jit
def _store(heads, tensor, rows, columns, value, inside):
    """Stores a value [ROWS, COLUMNS] to tokens of the program's head, in the tensor's dtype."""
    pointers = _pointers(heads, tensor, rows, columns)
    tl.store(pointers, value.to(tensor.first.dtype.element_ty), inside)


@triton.jit
def _gains(gains, heads):
    """Returns alpha, beta and gamma of the program's head, from [3, H]."""
    head = gains + tl.program_id(0) % heads
    return tl.load(head), tl.load(head + heads), tl.load(head + 2 * heads)


@triton.jit
def _valid(lengths, tokens, heads):
    """Returns the number of valid tokens of the program's sequence, from [B] or None."""
    if lengths is None:
        return tokens
    else:
        return tl.load(lengths + tl.program_id(0) // heads)


@triton.jit
def _sum(heads, tensor, valid, columns, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the sum over the valid tokens of the program's head, [1, COLUMNS]."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, valid, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < valid)[:, None] & (columns < width)[None, :]
        total += _load(heads, tensor, rows, columns, inside)
    return tl.sum(total, 0)[None, :]


@triton.jit
def _shaped_attention_terms_kernel(
    v, av, out,  # Heads
    gains,  # [3, H] float32
    lengths,  # [B] or None
    tokens, heads, width,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes out = alpha v + beta A v - gamma C v of one head of one sequence; 0 at padded tokens.

    av holds A v, the softmax attention; C v is the mean of v over the keys that a query sees.
    """
    alpha, beta, gamma = _gains(gains, heads)
    valid = _valid(lengths, tokens, heads)
    columns = tl.arange(0, COLUMNS)
    if CAUSAL:
        before = tl.zeros((1, COLUMNS), tl.float32)  # the sum over the blocks before
    else:
        mean = _sum(heads, v, valid, columns, width, ROWS, COLUMNS) / tl.maximum(valid, 1)
    for start in range(0, tokens, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < valid)[:, None] & (columns < width)[None, :]
        value = _load(heads, v, rows, columns, inside)
        attended = _load(heads, av, rows, columns, inside)
        if CAUSAL:
            mean = (before + tl.cumsum(value, 0)) * (1.0 / (rows + 1))[:, None]
            before += tl.sum(value, 0)[None, :]
        result = tl.where(inside, alpha * value + beta * attended - gamma * mean, 0.0)
        within = (rows < tokens)[:, None] & (columns < width)[None, :]
        _store(heads, out, rows, columns, result, within)


@triton.jit
def _shaped_attention_gradients_kernel(
    # Heads; *_grad: the gradients of ordinary attention; d*: written
    grad, v, av, q_grad, k_grad, v_grad, dq, dk, dv,
    parts,  # [3, B, H] float32: each program's share of the gains' gradients
    gains,  # [3, H] float32
    lengths,  # [B] or None
    tokens, heads, width,
    sign,  # factor of dq
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes dq, dk, dv and parts of one head of one sequence; gradients are 0 at padded tokens.

    From the last token to the first, since a token's value is in the means of all later tokens.
    """
    alpha, beta, gamma = _gains(gains, heads)
    valid = _valid(lengths, tokens, heads)
    columns = tl.arange(0, COLUMNS)
    if CAUSAL:
        after = tl.zeros((1, COLUMNS), tl.float32)  # the sum over the blocks of later tokens
    else:
        spread = _sum(heads, grad, valid, columns, width, ROWS, COLUMNS) / tl.maximum(valid, 1)
    d_alpha = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_beta = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_gamma = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tokens, ROWS):
        rows = tokens - 1 - start - tl.arange(0, ROWS)
        within = (rows >= 0)[:, None] & (columns < width)[None, :]
        inside = within & (rows < valid)[:, None]
        g = _load(heads, grad, rows, columns, inside)
        value = _load(heads, v, rows, columns, inside)
        if CAUSAL:
            # A choice, not a product: with products a fused multiply-add rounds the same sum
            # differently in two lanes.
            shares = tl.where(inside, g * (1.0 / tl.maximum(rows + 1, 1))[:, None], 0.0)
            spread = after + tl.cumsum(shares, 0)
            after += tl.sum(shares, 0)[None, :]
        d_alpha += g * value
        d_beta += g * _load(heads, av, rows, columns, inside)
        d_gamma -= value * spread
        dv_rows = alpha * g + beta * _load(heads, v_grad, rows, columns, inside) - gamma * spread
        _store(heads, dv, rows, columns, tl.where(inside, dv_rows, 0.0), within)
        dq_rows = sign * beta * _load(heads, q_grad, rows, columns, inside)
        _store(heads, dq, rows, columns, dq_rows, within)
        dk_rows = beta * _load(heads, k_grad, rows, columns, inside)
        _store(heads, dk, rows, columns, dk_rows, within)
    part = parts + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(part, tl.sum(tl.sum(d_alpha, 1), 0))
    tl.store(part + programs, tl.sum(tl.sum(d_beta, 1), 0))
    tl.store(part + 2 * programs, tl.sum(tl.sum(d_gamma, 1), 0))
