"""Kernels of parallel_mlp's hidden layer: its activation, and its gradient."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import block_of_program, rounded_to_tf32
from simplclip.kernels.mlp.activations import activation, slope


@triton.jit
def _parallel_mlp_activate_kernel(
    h,  # [count]
    activated,  # [count], written
    count,  # a thread accesses 16 bytes at a time if this is a multiple of 16
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes act(h) to `activated`; a program computes BLOCK elements."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < count - first
    values = activation(tl.load(h + first + offset, inside, 0.0).to(tl.float32), ACT)
    tl.store(activated + first + offset, values.to(h.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _parallel_mlp_hidden_kernel(
    grad,  # [T, C]
    weight,  # [C, F]
    h,  # [T, F], overwritten
    tokens,
    width,  # C
    hidden,  # F
    grad_stride,
    weight_stride,
    h_stride,
    ACT: tl.constexpr,
    EVEN: tl.constexpr,  # C is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Overwrites h by (grad weight) ∘ act'(h); a program computes a block [BLOCK_M, BLOCK_N].

    It reads only the part of h that it overwrites.
    """
    row_block, column_block = block_of_program(
        tl.cdiv(tokens, BLOCK_M), tl.cdiv(hidden, BLOCK_N), BLOCK_M
    )
    row = row_block * BLOCK_M
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    grad_pointers = (
        grad + row.to(tl.int64) * grad_stride + rows[:, None] * grad_stride + depth[None, :]
    )
    weight_pointers = weight + depth[:, None] * weight_stride + columns[None, :]
    inside = (columns < hidden)[None, :]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            grad_tile = tl.load(grad_pointers)
            weight_tile = tl.load(weight_pointers, inside, 0.0)
        else:
            grad_tile = tl.load(grad_pointers, (depth < width - start)[None, :], 0.0)
            weight_tile = tl.load(weight_pointers, (depth < width - start)[:, None] & inside, 0.0)
        if PRECISION == "tf32":
            grad_tile, weight_tile = rounded_to_tf32(grad_tile), rounded_to_tf32(weight_tile)
        tile = tl.dot(grad_tile, weight_tile, tile, input_precision=PRECISION)
        grad_pointers += BLOCK_K
        weight_pointers += BLOCK_K * weight_stride

    rows = tl.arange(0, BLOCK_M)
    inside = (row + rows < tokens)[:, None] & (columns < hidden)[None, :]
    h_pointers = h + row.to(tl.int64) * h_stride + rows[:, None] * h_stride + columns[None, :]
    tile *= slope(tl.load(h_pointers, inside, 0.0).to(tl.float32), ACT)
    tl.store(h_pointers, tile.to(h.dtype.element_ty), inside)
