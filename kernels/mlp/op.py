"""parallel_mlp on a GPU: act(h) lies in scratch, some rows at a time, and cuBLAS multiplies it; dh
overwrites h.

A kernel that applied the activation to the operand it loads would do so once for each block of
columns, and more often than it multiplies: its tensor cores would wait. The derivative is needed
once for each element, so that a kernel computes dh.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.arithmetic import block_of_program
from simplclip.kernels.launch import (
    architecture_and_processors,
    device_of,
    launch,
    precision_of,
    product,
)
from simplclip.kernels.mlp.activations import activation, slope
from simplclip.ops.mlp.call import HiddenCall, HiddenGradient

GROUP = 8  # blocks of rows that use the same blocks of columns while these columns are in the cache
BLOCK = 2048  # elements that a program activates
SCRATCH_BYTES = 16 << 20  # of the rows of act(h) that exist at a time


@triton.jit(do_not_specialize=["count"])
def _parallel_mlp_activate_kernel(h, activated, count, ACT: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    each = tl.arange(0, BLOCK)
    inside = each < count - first
    values = activation(tl.load(h + first + each, inside, 0.0).to(tl.float32), ACT)
    tl.store(activated + first + each, values.to(h.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _parallel_mlp_hidden_kernel(
    grad,  # [T, C]
    weight,  # [C, F]
    h,  # [T, F], overwritten
    tokens, width, hidden, grad_stride, weight_stride, h_stride,
    ACT: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,  # EVEN: C is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Overwrites h by (grad weight) ∘ act'(h); a program reads only the part of h that it
    overwrites.
    """
    row_block, column_block = block_of_program(
        tl.cdiv(tokens, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP
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
        tile = tl.dot(grad_tile, weight_tile, tile, input_precision=PRECISION)
        grad_pointers += BLOCK_K
        weight_pointers += BLOCK_K * weight_stride

    rows = tl.arange(0, BLOCK_M)
    inside = (row + rows < tokens)[:, None] & (columns < hidden)[None, :]
    h_pointers = h + row.to(tl.int64) * h_stride + rows[:, None] * h_stride + columns[None, :]
    tile *= slope(tl.load(h_pointers, inside, 0.0).to(tl.float32), ACT)
    tl.store(h_pointers, tile.to(h.dtype.element_ty), inside)


def _chunks(h: Tensor) -> list[slice]:
    """Returns ranges of rows of nearly equal size, for each of which act(h) fits SCRATCH_BYTES."""
    tokens = h.shape[0]
    limit = max(64, SCRATCH_BYTES // (h.shape[1] * h.itemsize))
    step = -(-tokens // -(-tokens // limit))
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def _activated(h: Tensor, act: str, scratch: Tensor) -> Tensor:  # [rows, F], contiguous
    """Writes act(h) to the first rows of the scratch and returns these rows."""
    out = scratch[: h.shape[0]]
    programs = triton.cdiv(h.numel(), BLOCK)
    launch(_parallel_mlp_activate_kernel, programs, h, out, h.numel(), ACT=act, BLOCK=BLOCK)
    return out


def _scratch(h: Tensor, chunks: list[slice]) -> Tensor:
    return torch.empty_like(h[chunks[0]])


def parallel_mlp_fwd(call: HiddenCall) -> None:
    """Writes act(h) weightᵀ + bias to out, or adds it.

    Scratch: SCRATCH_BYTES, or 64 rows of act(h).
    """
    h = call.h
    out = call.out
    weight = call.weight.T
    bias = call.bias
    if not out.numel():
        return
    chunks = _chunks(h)
    scratch = _scratch(h, chunks)
    if call.accumulate and bias is not None:
        out += bias
    with device_of(h):
        for rows in chunks:
            activated, out_chunk = _activated(h[rows], call.act, scratch), out[rows]
            if call.accumulate:
                out_chunk.addmm_(activated, weight)
            elif bias is None:
                torch.mm(activated, weight, out=out_chunk)
            else:
                torch.addmm(bias, activated, weight, out=out_chunk)


def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:  # [C, F], [0, F] if not needed
    """Computes dweight = gradᵀ act(h), then overwrites h by dh = (grad weight) ∘ act'(h); returns
    dweight.

    Scratch: that of forward, and if it does not hold all of act(h), also dweight in float32.
    """
    grad = call.grad
    h = call.h
    weight = call.weight
    with device_of(h):
        d_weight = (
            _weight_gradient(grad, h, call.act)
            if call.need_weight
            else weight.new_empty(0, weight.shape[1])
        )
        if h.numel():
            precision = precision_of(h.dtype)
            tile = tuning.lookup("parallel_mlp", precision, architecture_and_processors(h)[0])
            programs = triton.cdiv(h.shape[0], tile.block_m) * triton.cdiv(h.shape[1], tile.block_n)
            launch(
                _parallel_mlp_hidden_kernel,
                programs,
                grad,
                weight,
                h,
                *grad.shape,
                h.shape[1],
                grad.stride(0),
                weight.stride(0),
                h.stride(0),
                ACT=call.act,
                EVEN=grad.shape[1] % tile.block_k == 0,
                GROUP=GROUP,
                PRECISION="tf32" if precision == "tf32" else "ieee",
                **tile.options(),
            )
    return d_weight


def _weight_gradient(grad: Tensor, h: Tensor, act: str) -> Tensor:  # [C, F]
    if not h.numel():
        return h.new_zeros(grad.shape[1], h.shape[1])
    chunks = _chunks(h)
    scratch = _scratch(h, chunks)
    if len(chunks) == 1:
        return grad.T @ _activated(h, act, scratch)
    total = h.new_zeros(grad.shape[1], h.shape[1], dtype=torch.float32)
    for rows in chunks:
        product(total, grad[rows].T, _activated(h[rows], act, scratch), add=True)
    return total.to(h.dtype)
