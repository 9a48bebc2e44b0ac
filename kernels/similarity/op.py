"""Launchers of similarity_loss's Triton kernels, which compute the results of
simplclip.ops.similarity.reference.

tile.py: a tile of a product. forward.py: statistics. backward.py, sigmoid.py: the gradient G of the
similarities. plan.py: sizes of the launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simplclip.kernels.launch import device_of, launch, product
from simplclip.kernels.similarity.backward import (
    SUMS,
    _similarity_gradient_kernel,
    _similarity_range_kernel,
)
from simplclip.kernels.similarity.forward import (
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
    _similarity_statistics_kernel,
)
from simplclip.kernels.similarity.plan import (
    ROW_SLOTS,
    arguments,
    block_sides,
    blocks_of,
    column_slots,
    sweeps,
    tile_of,
)
from simplclip.ops.similarity.call import (
    ColumnStat,
    RowStat,
    SigmoidCall,
    SimilarityCall,
    SimilarityGradient,
)

# Blocks of the small kernels, which have no tiles in tuning.py.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64}
MERGE_WARPS = 8
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}
RANGE = {"BLOCK": 2048}


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the reference's results.

    Scratch besides the results: the parts of column statistics, at most as many bytes as `chunk`
    rows of one matrix (or one block of rows' parts), and the parts of row statistics.
    """
    image = call.image
    n = call.image.shape[0]
    m = call.text.shape[0]
    rows = image.new_zeros(len(RowStat), n, dtype=torch.float32)
    columns = image.new_zeros(len(ColumnStat), m, dtype=torch.float32)
    with device_of(image):
        _write_positives(call, RowStat.DIAGONAL_STUDENT, image, call.text, rows)
        if call.has_teacher:
            _write_positives(
                call, RowStat.DIAGONAL_TEACHER, call.teacher_image, call.teacher_text, rows
            )
        _write_statistics(call, rows, columns)
    # none on a GPU
    stored = image.new_empty(call.matrices if call.stored_rows else 0, call.stored_rows, m)
    return rows, columns, stored


def _write_positives(
    call: SimilarityCall, stat: RowStat, image: Tensor, text: Tensor, rows: Tensor
) -> None:
    n, width = image.shape
    blocks = -(-n // DIAGONAL["BLOCK_M"])
    launch(
        _similarity_diagonal_kernel,
        blocks,
        image,
        text,
        rows,
        int(stat),
        n,
        width,
        call.label_offset,
        **DIAGONAL,
    )


def _arguments(call: SimilarityCall) -> dict[str, Any]:
    """Returns the arguments that the statistics kernel and the gradient kernel have in common."""
    teacher_width = call.teacher_image.shape[1] if call.has_teacher else 0
    teacher = {
        name: getattr(call, name) for name in ("teacher_image", "teacher_text", "teacher_scale")
    }
    more = {"scale": call.scale, "plane": call.plane, "teacher_width": teacher_width}
    return {**arguments(call, teacher_width), **teacher, **more}


def _write_statistics(call: SimilarityCall, rows: Tensor, columns: Tensor) -> None:
    shared = _arguments(call)
    m = call.text.shape[0]
    slots = column_slots(call)
    for sweep in sweeps(call):
        row_parts = rows.new_empty(sweep.splits, ROW_SLOTS, sweep.row_count)
        column_parts = rows.new_empty(sweep.row_blocks, slots, m) if call.columns else None
        launch(
            _similarity_statistics_kernel,
            sweep.row_blocks * sweep.splits,
            **shared,
            **sweep._asdict(),
            row_parts=row_parts,
            column_parts=column_parts,
            entropy=call.entropy,
            ROW_SLOTS=ROW_SLOTS,
            COLUMN_SLOTS=slots,
        )
        _merge(call, row_parts, rows, sweep.first_row, plane=call.plane is not None)
        if call.columns:
            _merge(call, column_parts, columns, 0, previous=sweep.first_row > 0)


def _merge(
    call: SimilarityCall,
    parts: Tensor,
    out: Tensor,
    first: int,
    *,
    plane: bool = False,
    previous: bool = False,
) -> None:
    """Merges parts [parts, slots, size] into `out`, [6, N] or [3, M]. previous: with the statistics
    that `out` holds.
    """
    count, slots, size = parts.shape
    launch(
        _similarity_merge_kernel,
        -(-size // MERGE["BLOCK"]),
        parts,
        out,
        size,
        count,
        out.shape[1],
        first,
        SLOTS=slots,
        HAS_TEACHER=call.has_teacher,
        HAS_PLANE=plane,
        PREVIOUS=previous,
        **MERGE,
        num_warps=MERGE_WARPS,
    )


def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the reference's gradients.

    For each block of the matrix a kernel computes G, which is then multiplied by the features of
    both sides.

    Scratch besides the results: as many elements as `chunk` rows of one matrix; for half types also
    the gradients in float32.
    """
    grads = {
        "grad_rows": call.grad_rows,
        "grad_columns": call.grad_columns if call.columns else None,
    }
    stats = {"rows": call.row_stats, "columns": call.column_stats if call.columns else None}
    with device_of(call.image):
        factor = range_factor(
            call, scale=call.scale, plane=call.plane, **grads, HAS_TEACHER=call.has_teacher
        )
        d_image, d_text, sums = gradients_in_blocks(
            call,
            _similarity_gradient_kernel,
            SUMS,
            *factor,
            call.image.dtype,
            **_arguments(call),
            **stats,
            **grads,
        )
    return d_image, d_text, sums[:, 0].sum(), sums[:, 1:].sum(0)


def range_factor(
    call: SimilarityGradient | SigmoidCall, **of_call: Any
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the power of two by which float16 matrices are multiplied before they are rounded,
    and its reciprocal.

    With a mean over N rows, G has entries of about s/N² for a scale s, below float16's least
    number, 2^-24, from N = 4,096 √s on. No value is read from the device. of_call: the kernel's
    arguments, by default None.
    """
    if call.image.dtype != torch.float16:
        return None, None
    out = call.image.new_empty(2, dtype=torch.float32)
    absent = dict.fromkeys(("scale", "plane", "grad_rows", "grad_columns", "sigmoids"))
    constants = {"HAS_TEACHER": False, "TERMS": 0, **RANGE, "num_warps": 8}
    sizes = {"n": call.image.shape[0], "m": call.text.shape[0]}
    launch(_similarity_range_kernel, 1, **{**absent, **constants, **sizes, **of_call}, out=out)
    return out[0], out[1]


class FeatureGradient:
    """The gradient of features: a float32 sum, to whose rows products with blocks of G are added in
    place.

    The sum is not bfloat16, since cuBLAS, where it splits a long sum, would add up the parts in
    bfloat16.
    """

    def __init__(self, features: Tensor, needed: bool, dtype: torch.dtype):  # [N, D]
        self.needed, self.dtype = needed, dtype
        self.sum = features.new_empty(
            features.shape[0] * needed, features.shape[1], dtype=torch.float32
        )
        self.started: set[int] = set()  # the first rows of the ranges that have a product

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Adds left right to these rows.

        The ranges of rows of any two calls are equal or disjoint.
        """
        if self.needed:
            product(self.sum[rows], left, right, add=rows.start in self.started)
            self.started.add(rows.start)

    def result(self, unscale: Tensor | None) -> Tensor:  # [N, D] or [0, D]
        """Returns the sum, times `unscale` if there is one. No call may follow."""
        total, self.sum = self.sum, None
        return (total if unscale is None else total.mul_(unscale)).to(self.dtype)


def gradients_in_blocks(
    call: SimilarityGradient | SigmoidCall,
    kernel: Any,
    numbers: int,  # sums of a program
    factor: Tensor | None,
    unscale: Tensor | None,
    dtype: torch.dtype,
    stored: bool = True,
    **of_kernel: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_image, d_text and the programs' sums [programs, numbers] from a kernel that
    computes blocks of G.

    A program adds to sums of its own in all blocks, so that the order of sums is fixed. dtype: of
    d_image and d_text. stored: whether the kernel stores G.
    """
    (n, _), m, tile = call.image.shape, call.text.shape[0], tile_of(call)
    rows, columns = block_sides(n, m, call.chunk * m)
    # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    pitch = -(-columns // 16) * 16
    scratch = call.image.new_empty(rows if stored else 0, pitch)
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    sums = call.image.new_zeros(tiles, numbers, dtype=torch.float32)
    d_image = FeatureGradient(call.image, call.need_image, dtype)
    d_text = FeatureGradient(call.text, call.need_text, dtype)
    shared = {
        **arguments(call),
        **of_kernel,
        "factor": factor,
        "out": scratch,
        "sums": sums,
        "out_stride": pitch,
    }
    for row_range, column_range in blocks_of(n, m, rows, columns):
        height, breadth = row_range.stop - row_range.start, column_range.stop - column_range.start
        row_blocks, column_blocks = -(-height // tile.block_m), -(-breadth // tile.block_n)
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
    del scratch, shared, g  # before the results in the features' dtype
    return d_image.result(unscale), d_text.result(unscale), sums
