"""Gradients of features from a kernel that computes blocks of G, the gradient of the similarities.

A block of G lies in scratch; cuBLAS multiplies it by the features of both sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import SigmoidCall, SimilarityGradient
from simplclip.kernels.runtime import architecture_and_processors, launch, product
from simplclip.kernels.similarity.gradient import _similarity_range_kernel
from simplclip.kernels.similarity.plan import block_sides, blocks_of
from simplclip.kernels.tuning import Tile

RANGE = {"BLOCK": 2048}  # of the range kernel, which has no tile in tuning.py


def range_factor(
    call: SimilarityGradient | SigmoidCall, **inputs: Any
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the power of two by which G is multiplied before it is rounded, and its reciprocal.

    G: the gradient of the similarities. Both [] float32 on the device, from which no value is read;
    (None, None) unless the features are float16. inputs: the range kernel's arguments, by default
    None. With a mean over N rows, G has entries of about s/N² for a scale s, below float16's least
    number, 2^-24, from N = 4,096 √s on.
    """
    if call.image.dtype != torch.float16:
        return None, None
    out = call.image.new_empty(2, dtype=torch.float32)
    absent = dict.fromkeys(("scale", "plane", "grad_rows", "grad_columns", "sigmoids"))
    constants = {"HAS_TEACHER": False, "TERMS": 0, **RANGE, "num_warps": 8}
    sizes = {"n": call.image.shape[0], "m": call.text.shape[0]}
    launch(_similarity_range_kernel, 1, **{**absent, **constants, **sizes, **inputs}, out=out)
    return out[0], out[1]


class FeatureGradient:
    """The gradient of features: a float32 sum, to whose rows products with blocks of G are added.

    In bfloat16 cuBLAS, where it splits a long sum, would add up the parts in bfloat16.
    """

    def __init__(self, features: Tensor, needed: bool, dtype: torch.dtype):  # [N, D]
        """Allocates the sum, [N, D], or [0, D] if not needed; dtype: of the result."""
        self.needed = needed
        self.dtype = dtype
        rows, width = features.shape
        self.sum = features.new_empty(rows if needed else 0, width, dtype=torch.float32)
        self.started: set[int] = set()  # the first rows of the ranges that have a product

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Adds the product left right to these rows of the sum; does nothing if not needed.

        The ranges of rows of any two calls are equal or disjoint, and cover all rows in the end.
        """
        if self.needed:
            product(self.sum[rows], left, right, add=rows.start in self.started)
            self.started.add(rows.start)

    def result(self, unscale: Tensor | None) -> Tensor:  # [N, D] or [0, D]
        """Frees the sum; returns it in the result's dtype, times `unscale` unless None."""
        total = self.sum
        del self.sum
        if unscale is not None:
            total.mul_(unscale)
        return total.to(self.dtype)


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
    dtype: of d_image and d_text; one that the call does not need has no rows. stored: whether the
    kernel stores G; False only if neither is needed. inputs: its other arguments and options.
    """
    factor, unscale = range_
    n = call.image.shape[0]
    m = call.text.shape[0]
    processors = architecture_and_processors(call.image)[1]
    rows, columns = block_sides(n, m, call.chunk * m, call.image.shape[1], processors)
    # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    pitch = -(-columns // 16) * 16
    scratch = call.image.new_empty(rows if stored else 0, pitch)
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    sums = call.image.new_zeros(tiles, numbers, dtype=torch.float32)
    d_image = FeatureGradient(call.image, call.need_image, dtype)
    d_text = FeatureGradient(call.text, call.need_text, dtype)
    outputs = {"factor": factor, "out": scratch, "sums": sums, "out_stride": pitch}
    shared = {**inputs, **outputs}
    for row_range, column_range in blocks_of(n, m, rows, columns):
        height = row_range.stop - row_range.start
        breadth = column_range.stop - column_range.start
        row_blocks = -(-height // tile.block_m)
        column_blocks = -(-breadth // tile.block_n)
        launch(
            kernel,
            row_blocks * column_blocks,
            **shared,
            first_row=row_range.start,
            first_column=column_range.start,
            row_blocks=row_blocks,
            column_blocks=column_blocks,
        )
        g = scratch[:height, :breadth]
        d_image.add(row_range, g, call.text[column_range])
        d_text.add(column_range, g.T, call.image[row_range])
    del scratch, outputs, shared, g  # before the results in the features' dtype
    return d_image.result(unscale), d_text.result(unscale), sums
