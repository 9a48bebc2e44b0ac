"""Kernel and launcher of similarity_sigmoid: values and gradients of sigmoid terms in one sweep
over blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.arithmetic import block_of_program
from simplclip.kernels.launch import device_of
from simplclip.kernels.similarity.backward import add_to_sum, store_gradient
from simplclip.kernels.similarity.op import gradients_in_blocks, range_factor
from simplclip.kernels.similarity.tile import (
    GROUP,
    is_negative,
    product,
    softplus_and_sigmoid,
    times_nonzero,
)
from simplclip.ops.similarity.call import SigmoidCall


@triton.jit(
    do_not_specialize=[
        "n",
        "m",
        "label_offset",
        "first_row",
        "first_column",
        "row_blocks",
        "column_blocks",
    ],
)
def _similarity_sigmoid_kernel(
    image,  # [N, D]
    text,  # [M, D]
    sigmoids,  # [5, TERMS]: weight, bias, negative, positive, mix
    ids,  # [N] or None
    text_ids,  # [M] or None
    factor,  # [] or None: the factor of G before it is rounded
    out,  # [rows, out_stride], a block of G, only if GRADIENT
    sums,  # [programs, 3, TERMS]: values, gradients of weight and bias
    n,
    m,
    width,
    label_offset,
    first_row,  # of the block, as is first_column
    first_column,
    row_blocks,
    column_blocks,
    out_stride,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,  # plan.Tiling
):
    """Adds a tile's part of the terms and of the gradients of their numbers to this program's sums;
    writes a tile of G.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    row_block, column_block = block_of_program(row_blocks, column_blocks, GROUP)
    row = first_row + row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first_column + column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    sums += tl.program_id(0) * 3 * TERMS

    similarity = product(image, text, row, column, n, m, width, TILE)
    negative = is_negative(None, row, column, n, m, label_offset, ids, text_ids)
    positive = (row < n)[:, None] & (column[None, :] == row[:, None] + label_offset)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(TERMS):
        logits = similarity * tl.load(sigmoids + k) + tl.load(sigmoids + TERMS + k)
        logits = tl.where(positive, -logits, logits)
        softplus, slope = softplus_and_sigmoid(logits)
        # NaN where a positive's logit is infinite, though it may be 0
        softplus += tl.where(positive, 0.0 * logits, 0.0)
        share = tl.where(
            positive, tl.load(sigmoids + 3 * TERMS + k), tl.load(sigmoids + 2 * TERMS + k)
        )
        share = tl.where(negative | positive, share, 0.0)
        add_to_sum(sums + k, times_nonzero(share, softplus))
        if GRADIENT:
            slope = times_nonzero(
                tl.where(positive, -share, share) * tl.load(sigmoids + 4 * TERMS + k), slope
            )
            add_to_sum(sums + TERMS + k, slope * similarity)
            add_to_sum(sums + 2 * TERMS + k, slope)
            g += slope * tl.load(sigmoids + k)
    if GRADIENT:
        store_gradient(out, g, factor, row, column, first_row, first_column, n, m, out_stride)


def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the reference's results, with gradients in the features' dtype, or in float32 for
    float16.

    Scratch besides the results: as many elements as `chunk` rows of the matrix; for bfloat16 also
    the gradients in float32.
    """
    terms, dtype = call.sigmoids.shape[1], call.image.dtype
    with device_of(call.image):
        factor = (
            range_factor(call, sigmoids=call.sigmoids, TERMS=terms)
            if call.gradient
            else (None, None)
        )
        d_image, d_text, sums = gradients_in_blocks(
            call,
            _similarity_sigmoid_kernel,
            3 * terms,
            *factor,
            torch.float32 if dtype == torch.float16 else dtype,
            stored=call.gradient,
            sigmoids=call.sigmoids,
            TERMS=terms,
            GRADIENT=call.gradient,
        )
    return sums[:, :terms].sum(0), d_image, d_text, sums[:, terms:].sum(0).view(2, terms)
