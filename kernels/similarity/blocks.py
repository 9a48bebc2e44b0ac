"""Gradients of features from a kernel that computes blocks of G, the gradient of the similarities.

A block of G lies in scratch; cuBLAS multiplies it by the features of both sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import SigmoidCall, SimilarityGradient
from simplclip.kernels.runtime import card, launch, product
from simplclip.kernels.similarity.gradient import _similarity_range_kernel
from simplclip.kernels.similarity.plan import block_sides, blocks_of
from simplclip.kernels.tuning import Tile

RANGE = {"BLOCK": 2048, "num_warps": 8}  # of the range kernel, which has no tile in tuning.py


def range_factor(
    call: SimilarityGradient | SigmoidCall, **inputs: Any
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the power of two by which G is multiplied before it is rounded, and its reciprocal.

    G: the gradient of the similarities. Both [] float32 on the device, from which no value is read;
    (None, None) unless the features are float16. inputs: of the range kernel beside the call's
    fields. With a mean over N rows, G has entries of about s/N² for a scale s, below float16's
    least number, 2^-24, from N = 4,096 √s on.
    """
    if call.image.dtype != torch.float16:
        return None, None
    out = call.image.new_empty(2, dtype=torch.float32)
    sizes = {"n": call.image.shape[0], "m": call.text.shape[0]}
    inputs = {"HAS_TEACHER": False, "TERMS": 0, **sizes, **inputs}
    launch(_similarity_range_kernel, 1, of=call, out=out, **inputs, **RANGE)
    return out[0], out[1]


def _finished(total: Tensor, unscale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns a sum in a dtype, times `unscale` unless None; may overwrite it."""
    if unscale is not None:
        total.mul_(unscale)
    return total.to(dtype)


def gradients_in_blocks(
    call: SimilarityGradient | SigmoidCall,
    kernel: Any,
    tile: Tile,
    numbers: int,  # sums of a program
    range_: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
    stored: bool = True,
    **inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_image [N, D], d_text [M, D] and the programs' sums [programs, numbers].

    kernel: computes blocks of G, the gradient of the similarities, one launch for each block. The
    sums are those that the kernel makes for gradients of numbers, as of the scale; a program adds
    to its own in all blocks, so that their order is fixed. range_: from `range_factor`.
    dtype: of d_image and d_text; one that the call does not need has no rows. Their sums over
    blocks are float32: in bfloat16 cuBLAS, where it splits a long sum, would add up the parts in
    bfloat16. stored: whether the kernel stores G; False only if neither is needed. inputs: its
    arguments beside the call's fields, and options.
    """
    factor, unscale = range_
    n, width = call.image.shape
    m = call.text.shape[0]
    processors = card(call.image).processors
    rows, columns = block_sides(n, m, call.chunk * m, width, processors)
    # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    pitch = -(-columns // 16) * 16
    scratch = call.image.new_empty(rows if stored else 0, pitch)
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    sums = call.image.new_zeros(tiles, numbers, dtype=torch.float32)
    d_image = sums.new_empty(n if call.need_image else 0, width)
    d_text = sums.new_empty(m if call.need_text else 0, width)
    inputs |= {"factor": factor, "out": scratch, "sums": sums, "out_stride": pitch}
    for row_range, column_range in blocks_of(n, m, rows, columns):
        height = row_range.stop - row_range.start
        breadth = column_range.stop - column_range.start
        row_blocks = -(-height // tile.block_m)
        column_blocks = -(-breadth // tile.block_n)
        launch(
            kernel,
            row_blocks * column_blocks,
            of=call,
            **inputs,
            first_row=row_range.start,
            first_column=column_range.start,
            row_blocks=row_blocks,
            column_blocks=column_blocks,
        )
        g = scratch[:height, :breadth]
        if call.need_image:
            others = call.text[column_range]
            product(d_image[row_range], g, others, add=column_range.start > 0)
        if call.need_text:
            product(d_text[column_range], g.T, call.image[row_range], add=row_range.start > 0)
    del scratch, inputs, g  # before the results in the features' dtype
    d_image = _finished(d_image, unscale, dtype)
    return d_image, _finished(d_text, unscale, dtype), sums
