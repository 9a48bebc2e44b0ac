"""Triton kernels of parallel_mlp: act(h) is computed when a tile of h is loaded, and never stored; dh overwrites h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.arithmetic import dot, narrowed
from simplclip.kernels.launch import (
    COMPILE,
    architecture_and_processors,
    device_of,
    interpreted,
    precision_of,
    splits,
    started,
)
from simplclip.kernels.mlp.activations import activation, slope
from simplclip.ops.mlp.call import HiddenCall, HiddenGradient

GROUP = 8  # blocks of rows that use the same blocks of columns while those are in the cache
TILE = 16  # steps over the tokens in a unit of work of the weight's gradient; each range of units stores a result to be added


@triton.jit
def _block(rows, columns, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a program's block; programs go through GROUP blocks of rows in turn."""
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    column_blocks = (columns + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return (first + within % group) * BLOCK_M, within // group * BLOCK_N


@triton.jit
def _activated(h_tile, ACT: tl.constexpr, INTERPRETED: tl.constexpr):
    return narrowed(activation(h_tile.to(tl.float32), ACT), h_tile.dtype, INTERPRETED)


@triton.jit
def _product(
    a_at, b_at, b_step, b_columns, inner,
    ACT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a b over `inner`, [BLOCK_M, BLOCK_N], with act(a) unless ACT is None.

    a_at, b_at: addresses of the first tiles; b's steps are b_step elements apart. b_columns: which of its columns are
    read, None: all. EVEN: `inner` is a multiple of BLOCK_K.
    """
    depth = tl.arange(0, BLOCK_K)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN:
            a_tile = tl.load(a_at)
            b_tile = tl.load(b_at) if b_columns is None else tl.load(b_at, b_columns[None, :], 0.0)
        else:
            a_tile = tl.load(a_at, (depth < inner - start)[None, :], 0.0)
            b_inside = (depth < inner - start)[:, None]
            b_tile = tl.load(b_at, b_inside if b_columns is None else b_inside & b_columns[None, :], 0.0)
        a_tile = a_tile if ACT is None else _activated(a_tile, ACT, INTERPRETED)
        tile = dot(a_tile, b_tile, tile, PRECISION, INTERPRETED)
        a_at += BLOCK_K
        b_at += b_step
    return tile


@triton.jit(do_not_specialize=["tokens"])
def _parallel_mlp_fwd_kernel(
    h,  # [T, F]
    weight,  # [C, F]
    bias,  # [C], or None
    out,  # [T, C]
    tokens, width, hidden, h_stride, weight_stride, out_stride,
    ACT: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,  # EVEN: of F, see _product
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = _block(tokens, width, GROUP, BLOCK_M, BLOCK_N)
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row)
    columns = tl.minimum(tl.arange(0, BLOCK_N), width - 1 - column)
    depth = tl.arange(0, BLOCK_K)
    h_at = h + row.to(tl.int64) * h_stride + rows[:, None] * h_stride + depth[None, :]
    weight_at = weight + column.to(tl.int64) * weight_stride + columns[None, :] * weight_stride + depth[:, None]
    tile = _product(
        h_at, weight_at, BLOCK_K, None, hidden, ACT, EVEN, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip

    columns = tl.arange(0, BLOCK_N)
    if bias is not None:
        tile += tl.load(bias + column + columns, column + columns < width, 0.0).to(tl.float32)[None, :]
    rows = tl.arange(0, BLOCK_M)
    inside = (row + rows < tokens)[:, None] & (column + columns < width)[None, :]
    out_at = out + row.to(tl.int64) * out_stride + rows[:, None] * out_stride + (column + columns)[None, :]
    if ACCUMULATE:
        tile += tl.load(out_at, inside, 0.0).to(tl.float32)
    tl.store(out_at, narrowed(tile, out.dtype.element_ty, INTERPRETED), inside)


@triton.jit(do_not_specialize=["tokens", "blocks", "range_tokens"])
def _parallel_mlp_weight_kernel(
    grad,  # [T, C]
    h,  # [T, F]
    d_weight,  # [ranges, C, F]
    tokens, width, hidden, grad_stride, h_stride, blocks, range_tokens,
    ACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes gradᵀ act(h) over a range of tokens."""
    part = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row_blocks = (width + BLOCK_M - 1) // BLOCK_M
    row = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * range_tokens
    end = tl.minimum(first + range_tokens, tokens)
    token = tl.arange(0, BLOCK_K)
    grad_at = grad + first.to(tl.int64) * grad_stride + token[None, :] * grad_stride + row[:, None]
    h_at = h + first.to(tl.int64) * h_stride + token[:, None] * h_stride + column[None, :]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        inside = start + token < end
        grad_tile = tl.load(grad_at, (row < width)[:, None] & inside[None, :], 0.0)
        h_tile = tl.load(h_at, inside[:, None] & (column < hidden)[None, :], 0.0)
        tile = dot(grad_tile, _activated(h_tile, ACT, INTERPRETED), tile, PRECISION, INTERPRETED)
        grad_at += BLOCK_K * grad_stride
        h_at += BLOCK_K * h_stride

    at = d_weight + (part.to(tl.int64) * width + row[:, None]) * hidden + column[None, :]
    inside = (row < width)[:, None] & (column < hidden)[None, :]
    tl.store(at, narrowed(tile, d_weight.dtype.element_ty, INTERPRETED), inside)


@triton.jit(do_not_specialize=["tokens"])
def _parallel_mlp_hidden_kernel(
    grad,  # [T, C]
    weight,  # [C, F]
    h,  # [T, F], overwritten
    tokens, width, hidden, grad_stride, weight_stride, h_stride,
    ACT: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,  # EVEN: of C, see _product
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Overwrites h by (grad weight) ∘ act'(h); a program reads only the part of h that it overwrites."""
    row, column = _block(tokens, hidden, GROUP, BLOCK_M, BLOCK_N)
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - row)
    columns = column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    grad_at = grad + row.to(tl.int64) * grad_stride + rows[:, None] * grad_stride + depth[None, :]
    weight_at = weight + depth[:, None] * weight_stride + columns[None, :]
    tile = _product(
        grad_at, weight_at, BLOCK_K * weight_stride, columns < hidden, width,
        None, EVEN, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    rows = tl.arange(0, BLOCK_M)
    inside = (row + rows < tokens)[:, None] & (columns < hidden)[None, :]
    h_at = h + row.to(tl.int64) * h_stride + rows[:, None] * h_stride + columns[None, :]
    tile *= slope(tl.load(h_at, inside, 0.0).to(tl.float32), ACT)
    tl.store(h_at, narrowed(tile, h.dtype.element_ty, INTERPRETED), inside)


def _tuned(op: str, h: Tensor) -> tuple[tuning.Tile, dict[str, object]]:
    """A kernel's tile, and the arguments that all kernels take."""
    precision = precision_of(h.dtype)
    tile = tuning.lookup(f"parallel_mlp_{op}", 1, precision, architecture_and_processors(h)[0])
    shared = {"PRECISION": "tf32" if precision == "tf32" else "ieee", "INTERPRETED": interpreted()}
    return tile, {**shared, **tile.options(), **COMPILE}


def _blocks(written: Tensor, tile: tuning.Tile) -> tuple[int]:
    """The grid of a kernel that writes a matrix in blocks."""
    return (triton.cdiv(written.shape[0], tile.block_m) * triton.cdiv(written.shape[1], tile.block_n),)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, copied if its rows are not dense (an expanded gradient)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def parallel_mlp_fwd(call: HiddenCall) -> None:
    """out (+)= act(h) weightᵀ + bias, added in float32 and rounded once. No scratch."""
    h, out, weight = call.h, call.out, _dense(call.weight)
    if not out.numel():
        return
    tile, shared = _tuned("fwd", h)
    with device_of(h):
        started(_parallel_mlp_fwd_kernel)[_blocks(out, tile)](
            h, weight, call.bias, out, *out.shape, h.shape[1], h.stride(0), weight.stride(0), out.stride(0),
            ACT=call.act, ACCUMULATE=call.accumulate, EVEN=h.shape[1] % tile.block_k == 0, GROUP=GROUP, **shared,
        )  # fmt: skip


def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:  # [C, F], [0, F] if not needed
    """dh = (grad weight) ∘ act'(h) over h, after dweight = gradᵀ act(h).

    Scratch: dweight in float32 for each range of tokens, if one range would not occupy all multiprocessors.
    """
    grad, h, weight = _dense(call.grad), call.h, _dense(call.weight)
    with device_of(h):
        d_weight = _weight_gradient(grad, h, call.act) if call.need_weight else weight.new_empty(0, weight.shape[1])
        if h.numel():
            tile, shared = _tuned("hidden", h)
            started(_parallel_mlp_hidden_kernel)[_blocks(h, tile)](
                grad, weight, h, *grad.shape, h.shape[1], grad.stride(0), weight.stride(0), h.stride(0),
                ACT=call.act, EVEN=grad.shape[1] % tile.block_k == 0, GROUP=GROUP, **shared,
            )  # fmt: skip
    return d_weight


def _weight_gradient(grad: Tensor, h: Tensor, act: str) -> Tensor:  # [C, F]
    (tokens, width), hidden = grad.shape, h.shape[1]
    if not tokens:
        return h.new_zeros(width, hidden)
    tile, shared = _tuned("weight", h)
    blocks = triton.cdiv(width, tile.block_m) * triton.cdiv(hidden, tile.block_n)
    step = TILE * tile.block_k
    slots = architecture_and_processors(h)[1] * tile.blocks
    ranges, tiles = splits(blocks, triton.cdiv(tokens, step), slots)
    parts = h.new_empty(ranges, width, hidden, dtype=h.dtype if ranges == 1 else torch.float32)
    started(_parallel_mlp_weight_kernel)[(blocks * ranges,)](
        grad, h, parts, tokens, width, hidden, grad.stride(0), h.stride(0), blocks, tiles * step, ACT=act, **shared,
    )  # fmt: skip
    return parts[0] if ranges == 1 else parts.sum(0).to(h.dtype)
