"""What the kernels of shaped_attention share: a program's place, rows of a head, and how many keys a row sees."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import narrowed


@triton.jit
def place(lengths, tokens, heads, BLOCK: tl.constexpr):
    """Program: block of a sequence's head; with the sequence, the head, both as one number, and the valid tokens.

    Later blocks come first: with a causal mask they have the most to do.
    """
    blocks = (tokens + BLOCK - 1) // BLOCK
    block = blocks - 1 - tl.program_id(0) % blocks
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    sequence = pair // heads
    length = tokens if lengths is None else tl.load(lengths + sequence)
    return block, sequence, pair % heads, pair, length


@triton.jit
def rows_of(base, row, stride, inside, width, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K], 0 where a row is not inside and beyond the width."""
    depth = tl.arange(0, BLOCK_K)
    mask = inside[:, None] if EVEN else inside[:, None] & (depth < width)[None, :]
    return tl.load(base + row[:, None] * stride + depth[None, :], mask, 0.0)


@triton.jit
def store_rows(base, row, stride, inside, width, value, INTERPRETED: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    depth = tl.arange(0, BLOCK_K)
    mask = inside[:, None] if EVEN else inside[:, None] & (depth < width)[None, :]
    value = narrowed(value, base.dtype.element_ty, INTERPRETED)
    tl.store(base + row[:, None] * stride + depth[None, :], value, mask)


@triton.jit
def visible_keys(row, length, CAUSAL: tl.constexpr):
    """The number of keys that a row sees: the first so many."""
    return tl.minimum(row + 1, length) if CAUSAL else row * 0 + length


@triton.jit
def keys_of_block(first, length, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """The number of keys that a block of rows sees; none if it is padding."""
    end = tl.minimum(first + BLOCK, length) if CAUSAL else length
    return tl.where(first < length, end, 0)
