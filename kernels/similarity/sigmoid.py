"""Kernel and launcher of similarity_sigmoid: values and gradients of sigmoid terms in one sweep over chunks of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.arithmetic import narrowed
from simplclip.kernels.launch import (
    COMPILE,
    architecture_and_processors,
    device_of,
    precision_of,
    started,
    starts,
)
from simplclip.kernels.similarity.gradients import FLOAT16_PEAK, ImageGradient, TextGradient, sigmoid_bounds
from simplclip.kernels.similarity.launch import Tiling
from simplclip.kernels.similarity.tile import (
    Pairs,
    Sigmoids,
    product,
    sigmoid_logits,
    sigmoid_pairs,
    sigmoid_slopes,
    sigmoid_values,
)
from simplclip.ops.similarity.call import SigmoidCall

SUMS = 3  # of each term: its value, d_weight, d_bias


@triton.jit(do_not_specialize=["n", "m", "label_offset", "first_row", "row_count", "row_blocks", "first_program"])
def _similarity_sigmoid_kernel(
    image,  # [N, D]
    text,  # [M, D]
    sigmoids,  # tile.Sigmoids
    mix,  # [TERMS]
    pairs,  # tile.Pairs
    factor,  # [] or None: the factor of the gradient before it is rounded
    out,  # [chunk, out_stride], only if GRADIENT
    sums,  # [programs, TERMS, SUMS]
    n,
    m,
    width,
    label_offset,
    first_row,
    row_count,
    row_blocks,
    first_program,
    out_stride,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,  # launch.Tiling
):
    """One tile: its share of the terms and of the gradients of their numbers, and the gradient to its similarities."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    program = tl.program_id(0)
    at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + at
    safe_row = tl.minimum(row, n - 1).to(tl.int64)
    column = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_column = tl.minimum(column, m - 1).to(tl.int64)

    similarity = product(image, text, safe_row, safe_column, width, TILE.EVEN, TILE)
    inside = (at < row_count)[:, None] & (column < m)[None, :]
    negative, positive = sigmoid_pairs(row, column, inside, label_offset, pairs, safe_row, safe_column)
    sums += (first_program + program).to(tl.int64) * TERMS * 3
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(TERMS):
        signed, amount, matched = sigmoid_logits(similarity, sigmoids, pairs, safe_row, safe_column, negative, positive, k)
        tl.store(sums + k * 3, tl.sum(tl.sum(sigmoid_values(signed, amount, matched), 1), 0))
        if GRADIENT:
            slope = sigmoid_slopes(signed, amount, matched) * tl.load(mix + k)
            tl.store(sums + k * 3 + 1, tl.sum(tl.sum(slope * similarity, 1), 0))
            tl.store(sums + k * 3 + 2, tl.sum(tl.sum(slope, 1), 0))
            total += slope * tl.load(sigmoids.weight + k)
    if GRADIENT:
        if factor is not None:
            total *= tl.load(factor)
        out += at.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(out, narrowed(total, out.dtype.element_ty, TILE.INTERPRETED), inside)


def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference's results; the gradients in the features' dtype, float16's in float32.

    Scratch besides the results: `chunk` rows of the matrix; for half types also a float32 sum of the text's gradient and one
    product that is added to it.
    """
    with device_of(call.image):
        return _sweep(call)


def _range_factor(call: SigmoidCall) -> Tensor | None:  # []
    """The power of two by which the gradient is multiplied before it is rounded to float16; None for other dtypes."""
    if call.image.dtype != torch.float16 or not call.gradient:
        return None
    bound = call.mix.abs() * sigmoid_bounds(call.weight, call.negative, call.positive, call.image_share, call.text_share)
    return torch.exp2((FLOAT16_PEAK - bound.sum().log2().ceil()).clamp(-100, 100))


def _sweep(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, m, width, image, text = call.image.shape[0], call.text.shape[0], call.image.shape[1], call.image, call.text
    precision, (architecture, _) = precision_of(image.dtype), architecture_and_processors(image)
    terms = call.weight.shape[0]
    tile = tuning.lookup("similarity_sigmoid", terms, precision, architecture)
    tiling = Tiling.of(tile, width, width, precision)
    numbers = Sigmoids(call.weight, call.bias, call.negative, call.positive)
    factor = _range_factor(call)
    back = None if factor is None else 1 / factor
    stored = torch.float32 if factor is not None else image.dtype
    rows = min(n, call.chunk)
    d_image = ImageGradient(image, 1, call.need_image, stored)
    d_text = TextGradient(text, -(-n // rows), call.need_text, stored)
    pitch = -(-m // 8) * 8  # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    scratch = image.new_empty(rows if call.gradient else 0, pitch)
    blocks, columns = -(-rows // tile.block_m), -(-m // tile.block_n)
    sums = torch.zeros(-(-n // rows) * blocks * columns, terms, SUMS, dtype=torch.float32, device=image.device)
    for index, first in enumerate(starts(n, rows)):
        at = slice(first, min(n, first + rows))
        count = at.stop - first
        row_blocks = -(-count // tile.block_m)
        started(_similarity_sigmoid_kernel)[(row_blocks * columns,)](
            image, text, numbers, call.mix, Pairs.of(call), factor, scratch, sums,
            n, m, width, call.label_offset, first, count, row_blocks, index * blocks * columns, pitch,
            TERMS=terms,
            GRADIENT=call.gradient,
            TILE=tiling,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILE,
        )  # fmt: skip
        g = scratch[:count, :m]
        d_image.add(at, g, text, back)
        d_image.flush(at)
        d_text.add(g.T, image[at], back)
    value, d_weight, d_bias = torch.unbind_copy(sums.sum(0, dtype=torch.float64).float(), 1)  # results share no memory
    return value, d_image.result(), d_text.result(), d_weight, d_bias
