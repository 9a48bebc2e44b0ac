"""Kernel and launcher of similarity_sigmoid: values and gradients of sigmoid terms in one sweep over blocks."""

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
)
from simplclip.kernels.similarity.gradients import FeatureGradient, range_factor
from simplclip.kernels.similarity.launch import Launch, Tiling, block_sides, blocks_of
from simplclip.kernels.similarity.tile import (
    Pairs,
    Sigmoids,
    interior,
    product,
    sigmoid_entries,
    store,
)
from simplclip.ops.similarity.call import SigmoidCall

SUMS = 3  # of each term: its value, d_weight, d_bias


@triton.jit(do_not_specialize=["n", "m", "label_offset", "first_row", "first_column", "row_blocks", "first_program"])
def _similarity_sigmoid_kernel(
    image,  # [N, D]
    text,  # [M, D]
    sigmoids,  # tile.Sigmoids
    mix,  # [TERMS]
    pairs,  # tile.Pairs
    factor,  # [] or None: the factor of the gradient before it is rounded
    out,  # [rows, out_stride], a block of the matrix's gradient, only if GRADIENT
    sums,  # [programs, TERMS, SUMS]
    n,
    m,
    width,
    label_offset,
    first_row,  # of the block, as is first_column
    first_column,
    row_blocks,
    first_program,
    out_stride,
    TERMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,  # launch.Tiling
):
    """Computes a tile's share of the terms and of the gradients of their numbers, and the gradient of its similarities."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    program = tl.program_id(0)
    at = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + at
    safe_row = tl.minimum(row, n - 1).to(tl.int64)
    column_at = program // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first_column + column_at
    safe_column = tl.minimum(column, m - 1).to(tl.int64)

    similarity = product(image, text, safe_row, safe_column, width, TILE.EVEN, TILE)
    plain = False
    if pairs.ids is None:
        first_column += program // row_blocks * BLOCK_N
        plain = interior(first_row + program % row_blocks * BLOCK_M, first_column, n, m, label_offset, BLOCK_M, BLOCK_N)
    sums += (first_program + program).to(tl.int64) * TERMS * 3
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(TERMS):
        value, slope, amount = sigmoid_entries(similarity, sigmoids, plain, row, column, n, m, label_offset, pairs, k, TILE)
        tl.store(sums + k * 3, tl.sum(value) * amount)
        if GRADIENT:
            slope *= amount * tl.load(mix + k)
            tl.store(sums + k * 3 + 1, tl.sum(slope * similarity))
            tl.store(sums + k * 3 + 2, tl.sum(slope))
            total += slope * tl.load(sigmoids.weight + k)
    if GRADIENT:
        if factor is not None:
            total *= tl.load(factor)
        out += at.to(tl.int64)[:, None] * out_stride + column_at[None, :]
        store(out, narrowed(total, out.dtype.element_ty, TILE.INTERPRETED), plain, row, column, n, m)


def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the reference's results, with gradients in the features' dtype, or in float32 for float16.

    Scratch besides the results: as many elements as `chunk` rows of the matrix; for bfloat16 also the gradients in float32.
    """
    with device_of(call.image):
        return _sweep(call)


def _sweep(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, m, width, image, text = call.image.shape[0], call.text.shape[0], call.image.shape[1], call.image, call.text
    precision, (architecture, _) = precision_of(image.dtype), architecture_and_processors(image)
    terms = call.weight.shape[0]
    tile = tuning.lookup("similarity_sigmoid", terms, precision, architecture)
    tiling = Tiling.of(tile, width, width, precision)
    numbers = Sigmoids(call.weight, call.bias, call.negative, call.positive)
    factor = back = None
    if call.gradient:
        launch = Launch(HAS_STUDENT=True, SIGMOIDS=terms)
        given = {"sigmoids": numbers, "mix": call.mix, "pairs": Pairs.of(call), "n": n, "m": m}
        none = dict.fromkeys(("grad_rows", "grad_columns", "scale", "cross_scale"))
        factor, back = range_factor(image, launch, **given, **none)
    stored = torch.float32 if factor is not None else image.dtype
    d_image, d_text = FeatureGradient(image, call.need_image, stored), FeatureGradient(text, call.need_text, stored)
    # Without gradients no part of the matrix is stored, so that the matrix is one block.
    rows, columns = block_sides(n, m, call.chunk * m) if call.gradient else (n, m)
    pitch = -(-columns // 8) * 8  # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    scratch = image.new_empty(rows if call.gradient else 0, pitch)
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    blocks = -(-n // rows) * -(-m // columns)
    sums = torch.zeros(blocks * tiles, terms, SUMS, dtype=torch.float32, device=image.device)
    for index, (at, of) in enumerate(blocks_of(0, n, m, rows, columns)):
        row_blocks = -(-(at.stop - at.start) // tile.block_m)
        started(_similarity_sigmoid_kernel)[(row_blocks * -(-(of.stop - of.start) // tile.block_n),)](
            image, text, numbers, call.mix, Pairs.of(call), factor, scratch, sums,
            n, m, width, call.label_offset, at.start, of.start, row_blocks, index * tiles, pitch,
            TERMS=terms,
            GRADIENT=call.gradient,
            TILE=tiling,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILE,
        )  # fmt: skip
        g = scratch[: at.stop - at.start, : of.stop - of.start]
        d_image.add(at, g, text[of])
        d_text.add(of, g.T, image[at])
    del scratch, g  # before the results in the features' dtype
    value, d_weight, d_bias = torch.unbind_copy(sums.sum(0, dtype=torch.float64).float(), 1)  # results share no memory
    return value, d_image.result(back), d_text.result(back), d_weight, d_bias
