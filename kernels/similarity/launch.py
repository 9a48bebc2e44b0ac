"""Launchers of similarity_loss's Triton kernels, which compute the results of
simplclip.ops.similarity.reference.

statistics.py: kernels of forward. gradient.py, sigmoid.py: kernels of the gradient G of the
similarities. tile.py: a tile of a product. blocks.py: G in blocks. plan.py: sizes of the launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import (
    ColumnStat,
    RowStat,
    SigmoidCall,
    SimilarityCall,
    SimilarityGradient,
)
from simplclip.kernels.runtime import launch
from simplclip.kernels.similarity.blocks import gradients_in_blocks, range_factor
from simplclip.kernels.similarity.gradient import SUMS, _similarity_gradient_kernel
from simplclip.kernels.similarity.plan import ROW_SLOTS, column_slots, sizes, sweeps, tile_of
from simplclip.kernels.similarity.sigmoid import _similarity_sigmoid_kernel
from simplclip.kernels.similarity.statistics import (
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
    _similarity_statistics_kernel,
)

# Blocks of the small kernels, which have no tiles in tuning.py.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64, "num_warps": 8}
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows [6, N] (RowStat), columns [3, M] (ColumnStat), and empty stored products.

    The values are the reference's. Scratch besides the results: the parts of column statistics, at
    most as many bytes as `chunk` rows of one matrix (or one block of rows' parts), and the parts of
    row statistics.
    """
    image = call.image
    n = call.image.shape[0]
    m = call.text.shape[0]
    rows = image.new_zeros(len(RowStat), n, dtype=torch.float32)
    columns = image.new_zeros(len(ColumnStat), m, dtype=torch.float32)
    with torch.cuda.device_of(image):
        for stat, left, right in (
            (RowStat.DIAGONAL_STUDENT, image, call.text),
            (RowStat.DIAGONAL_TEACHER, call.teacher_image, call.teacher_text),
        ):
            if left is not None:
                blocks = -(-n // DIAGONAL["BLOCK_M"])
                numbers = (int(stat), n, left.shape[1], call.label_offset)
                launch(_similarity_diagonal_kernel, blocks, left, right, rows, *numbers, **DIAGONAL)
        _write_statistics(call, rows, columns)
    # none on a GPU
    stored = image.new_empty(call.matrices if call.stored_rows else 0, call.stored_rows, m)
    return rows, columns, stored


def _teacher_width(call: SimilarityCall) -> int:
    return 0 if call.teacher_image is None else call.teacher_image.shape[1]


def _write_statistics(call: SimilarityCall, rows: Tensor, columns: Tensor) -> None:
    """Writes all statistics but those of the positives to rows [6, N] and columns [3, M]."""
    tile = tile_of(call, "statistics")
    shared = sizes(call, tile, teacher_width=_teacher_width(call))
    m = call.text.shape[0]
    slots = column_slots(call)
    for sweep in sweeps(call, tile):
        row_parts = rows.new_empty(sweep.splits, ROW_SLOTS, sweep.row_count)
        column_parts = rows.new_empty(sweep.row_blocks, slots, m) if call.columns else None
        launch(
            _similarity_statistics_kernel,
            sweep.row_blocks * sweep.splits,
            of=call,
            **shared,
            **sweep._asdict(),
            row_parts=row_parts,
            column_parts=column_parts,
            ROW_SLOTS=ROW_SLOTS,
            COLUMN_SLOTS=slots,
        )
        _merge(call, row_parts, rows, sweep.first_row, plane=call.plane is not None)
        if column_parts is not None:
            _merge(call, column_parts, columns, 0, previous=sweep.first_row > 0)


def _merge(
    call: SimilarityCall,
    parts: Tensor,  # [parts, slots, size]
    out: Tensor,  # [6, N] or [3, M]
    first: int,
    *,
    plane: bool = False,
    previous: bool = False,
) -> None:
    """Merges parts, and with `previous` what `out` holds, to `out` from column `first` on."""
    count, slots, size = parts.shape
    launch(
        _similarity_merge_kernel,
        -(-size // MERGE["BLOCK"]),
        *(parts, out, size, count, out.shape[1], first),
        SLOTS=slots,
        HAS_TEACHER=call.has_teacher,
        HAS_PLANE=plane,
        PREVIOUS=previous,
        **MERGE,
    )


def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns d_image, d_text (without rows where not needed), d_scale [] and d_plane [2].

    Scratch besides the results: as many elements as `chunk` rows of one matrix; for half types also
    the gradients in float32.
    """
    columns = call.column_stats if call.columns else None
    grads: dict[str, Any] = {"grad_columns": call.grad_columns if call.columns else None}
    tile = tile_of(call, "gradient")
    with torch.cuda.device_of(call.image):
        factor = range_factor(call, **grads, HAS_TEACHER=call.has_teacher)
        d_image, d_text, sums = gradients_in_blocks(
            call,
            _similarity_gradient_kernel,
            tile,
            SUMS,
            factor,
            call.image.dtype,
            **sizes(call, tile, teacher_width=_teacher_width(call)),
            rows=call.row_stats,
            columns=columns,
            **grads,
        )
    return d_image, d_text, sums[:, 0].sum(), sums[:, 1:].sum(0)


def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the terms [K], and the gradients d_image, d_text and d_sigmoids [2, K] of their sum.

    The sum is weighted by MIX; d_sigmoids has the gradients of WEIGHT and BIAS. d_image and d_text
    are in the features' dtype, or in float32 for float16, without rows unless needed.

    Scratch besides the results: as many elements as `chunk` rows of the matrix; for bfloat16 also
    the gradients in float32.
    """
    terms = call.sigmoids.shape[1]
    dtype = torch.float32 if call.image.dtype == torch.float16 else call.image.dtype
    tile = tile_of(call, "sigmoid")
    with torch.cuda.device_of(call.image):
        factor: tuple[Tensor | None, Tensor | None] = (None, None)
        if call.gradient:
            factor = range_factor(call, TERMS=terms)
        d_image, d_text, sums = gradients_in_blocks(
            call,
            _similarity_sigmoid_kernel,
            tile,
            3 * terms,
            factor,
            dtype,
            stored=call.gradient,
            **sizes(call, tile),
            TERMS=terms,
            GRADIENT=call.gradient,
        )
    return sums[:, :terms].sum(0), d_image, d_text, sums[:, terms:].sum(0).view(2, terms)
