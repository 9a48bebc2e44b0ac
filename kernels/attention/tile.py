"""Helpers of shaped_attention's kernels: a program's block, rows of a head, and the number of visible keys."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import narrowed


@triton.jit
def place(lengths, tokens, heads, BLOCK: tl.constexpr):
    """This program's block, sequence, head, the last two as one number, and the number of valid tokens.

    Later blocks run first, since with a causal mask they have the most work.
    """
    blocks = (tokens + BLOCK - 1) // BLOCK
    block = blocks - 1 - tl.program_id(0) % blocks
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    sequence = pair // heads
    length = tokens if lengths is None else tl.load(lengths + sequence)
    return block, sequence, pair % heads, pair, length


@triton.jit
def rows_of(base, row, stride, inside, width, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads [rows, BLOCK_K], 0 in rows that are not inside and beyond the width."""
    depth = tl.arange(0, BLOCK_K)
    mask = inside[:, None] if EVEN else inside[:, None] & (depth < width)[None, :]
    return tl.load(base + row[:, None] * stride + depth[None, :], mask, 0.0)


@triton.jit
def at_head(tensor, sequence, head, first, stride_b, stride_l, stride_h):
    """The address of row `first` of a head."""
    return tensor + sequence * stride_b + head * stride_h + first.to(tl.int64) * stride_l


@triton.jit
def load_head(
    tensor, sequence, head, first, stride_b, stride_l, stride_h, length, width,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loads a head's rows from `first` on, [BLOCK, BLOCK_K], 0 from `length` on."""
    row = tl.arange(0, BLOCK)
    at = at_head(tensor, sequence, head, first, stride_b, stride_l, stride_h)
    return rows_of(at, row, stride_l, first + row < length, width, EVEN, BLOCK_K)


@triton.jit
def store_head(
    tensor, sequence, head, first, stride_b, stride_l, stride_h, value, length, tokens, width,
    INTERPRETED: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores a head's rows from `first` on, 0 from `length` on."""
    row = first + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_K)
    written = (row < tokens)[:, None]
    mask = written if EVEN else written & (depth < width)[None, :]
    value = narrowed(tl.where((row < length)[:, None], value, 0.0), tensor.dtype.element_ty, INTERPRETED)
    at = at_head(tensor, sequence, head, first, stride_b, stride_l, stride_h)
    tl.store(at + tl.arange(0, BLOCK)[:, None] * stride_l + depth[None, :], value, mask)


@triton.jit
def visible_keys(row, length, CAUSAL: tl.constexpr):
    """The number of visible keys of a row; they are the first ones."""
    return tl.minimum(row + 1, length) if CAUSAL else row * 0 + length


@triton.jit
def keys_of_block(first, length, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """The number of visible keys of a block of rows, 0 if it is padding."""
    end = tl.minimum(first + BLOCK, length) if CAUSAL else length
    return tl.where(first < length, end, 0)
