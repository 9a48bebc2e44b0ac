"""Kernel of similarity_sigmoid: values and gradients of sigmoid terms in one sweep over blocks."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import block_of_program
from simplclip.kernels.similarity.gradient import SIZES, add_to_sum, store_gradient
from simplclip.kernels.similarity.rows import (
    BIAS,
    MIX,
    NEGATIVE,
    POSITIVE,
    WEIGHT,
    sigmoid_number,
)
from simplclip.kernels.similarity.tile import (
    is_negative,
    product,
    softplus_and_sigmoid,
    times_nonzero,
)


@triton.jit(do_not_specialize=SIZES)
def _similarity_sigmoid_kernel(
    image,  # [N, D]
    text,  # [M, D]
    sigmoids,  # [5, TERMS] SigmoidRow
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
    TILE: tl.constexpr,  # tuning.Tiling
):
    """Adds a tile's part of the terms, with GRADIENT also of their gradients, to sums.

    With GRADIENT it also writes the tile of G, the gradient of the similarities, to `out`. Each
    program has sums of its own.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    row_block, column_block = block_of_program(row_blocks, column_blocks, BLOCK_M)
    row_of_block = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column_of_block = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first_row + row_of_block
    column = first_column + column_of_block
    sums += tl.program_id(0) * 3 * TERMS

    similarity = product(image, text, row, column, n, m, width, TILE)
    negative = is_negative(None, row, column, n, m, label_offset, ids, text_ids)
    positive = (row < n)[:, None] & (column[None, :] == row[:, None] + label_offset)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(TERMS):
        weight = sigmoid_number(sigmoids, WEIGHT, k, TERMS)
        logits = similarity * weight + sigmoid_number(sigmoids, BIAS, k, TERMS)
        logits = tl.where(positive, -logits, logits)
        softplus, slope = softplus_and_sigmoid(logits)
        # NaN where a positive's logit is infinite, though it may be 0
        softplus += tl.where(positive, 0.0 * logits, 0.0)
        positive_factor = sigmoid_number(sigmoids, POSITIVE, k, TERMS)
        negative_factor = sigmoid_number(sigmoids, NEGATIVE, k, TERMS)
        share = tl.where(positive, positive_factor, negative_factor)
        share = tl.where(negative | positive, share, 0.0)
        add_to_sum(sums + k, times_nonzero(share, softplus))
        if GRADIENT:
            share = tl.where(positive, -share, share)
            slope = times_nonzero(share * sigmoid_number(sigmoids, MIX, k, TERMS), slope)
            add_to_sum(sums + TERMS + k, slope * similarity)
            add_to_sum(sums + 2 * TERMS + k, slope)
            g += slope * sigmoid_number(sigmoids, WEIGHT, k, TERMS)
    if GRADIENT:
        store_gradient(out, g, factor, row_of_block, column_of_block, n - first_row, out_stride)
