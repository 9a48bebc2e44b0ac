"""Launchers of similarity_loss's Triton kernels: what simplclip.reference defines, without a matrix of N×M.

similarity_tile: a tile of a product. similarity_forward, similarity_merge: statistics. similarity_backward: gradients to the
planes. similarity_launch: which planes share a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.similarity_forward import _similarity_statistics_kernel
from simplclip.kernels.similarity_launch import (
    COMPILE,
    Call,
    Launch,
    architecture_and_processors,
    arguments,
    column_splits,
    launches,
    precision_of,
)
from simplclip.kernels.similarity_merge import (
    _similarity_count_kernel,
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
)
from simplclip.reference import ColumnStat, RowStat

_GROUP = 8  # blocks of rows that share column tiles while those are in the cache


def similarity_loss_fwd(*args):
    """The reference's statistics: rows [12, N], columns [6, M], and an unused tensor of the shape that was asked for.

    Scratch beside the results: the parts of column statistics, at most as many bytes as `chunk` rows of one plane (or one
    block of rows' parts), and those of row statistics.
    """
    *shared, chunk, stored_rows = args
    call = Call(*shared)
    with torch.cuda.device_of(call.image):
        rows, columns = _statistics(call, chunk)
    planes = call.similarity + call.teacher + 2 * bool(call.interactive)
    return rows, columns, call.image.new_empty(planes if stored_rows else 0, stored_rows, call.text.shape[0])


def _statistics(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    n, m, image = call.image.shape[0], call.text.shape[0], call.image
    rows = torch.zeros(len(RowStat), n, dtype=torch.float32, device=image.device)
    columns = torch.zeros(len(ColumnStat), m, dtype=torch.float32, device=image.device)
    precision = precision_of(image.dtype)
    architecture, processors = architecture_and_processors(image)
    _positives(call, rows)
    for launch in launches(call):
        tile = tuning.lookup("similarity_forward", launch.tiles, precision, architecture)
        slots = launch.slots()
        blocks = -(-n // tile.block_m)
        if launch.COLUMNS:
            blocks = min(blocks, max(1, chunk * image.dtype.itemsize // (4 * slots["COLUMN_SLOTS"])))
            for stat in launch.column_lses():
                columns[stat].fill_(-torch.inf)  # over no rows yet; the parts of each group of rows are added
        for first in range(0, n, blocks * tile.block_m):
            count = min(n - first, blocks * tile.block_m)
            row_blocks = -(-count // tile.block_m)
            tiles = -(-m // tile.block_n)
            splits, per_split = column_splits(row_blocks, tiles, processors * tile.blocks)
            row_parts = rows.new_empty(splits, slots["ROW_SLOTS"], count)
            column_parts = columns.new_empty(row_blocks, slots["COLUMN_SLOTS"], m) if launch.COLUMNS else None
            _similarity_statistics_kernel[(row_blocks * splits,)](
                **arguments(call, launch, tile, precision),
                **slots,
                row_parts=row_parts,
                column_parts=column_parts,
                entropy=float(call.entropy),
                first_row=first,
                row_count=count,
                row_blocks=row_blocks,
                splits=splits,
                tiles_per_split=per_split,
                GROUP=_GROUP,
            )
            if launch.tiles > launch.V:
                _merge(launch, slots, row_parts, rows, first, of_rows=True)
            if launch.COLUMNS:
                _merge(launch, slots, column_parts, columns, 0, of_rows=False)
    return rows, columns


def _merge(
    launch: Launch,
    slots: dict[str, int],
    parts: Tensor,  # [parts, slots, size]
    out: Tensor,  # [12, N] or [6, M]
    first: int,
    *,
    of_rows: bool,
) -> None:
    block, size = 64, parts.shape[2]
    _similarity_merge_kernel[(-(-size // block),)](
        parts,
        out,
        size,
        parts.shape[0],
        out.shape[1],
        first,
        **launch.constants_of_merge(of_rows),
        **{name: slots[name] for name in ("T_AT", "X_AT", "Z_AT", "MATCH_AT")},
        SLOTS=parts.shape[1],
        PREVIOUS=not of_rows,
        BLOCK_PARTS=16,
        BLOCK=block,
        num_warps=4,
        **COMPILE,
    )


def _positives(call: Call, rows: Tensor) -> None:  # [12, N]
    n, m = call.image.shape[0], call.text.shape[0]
    block = 16
    _similarity_diagonal_kernel[(-(-n // block),)](
        **call.features(),
        plane_weight=call.plane_weight,
        rows_out=rows,
        n=n,
        **call.widths(),
        label_offset=call.label_offset,
        Z=call.similarity,
        L=call.hadamard,
        T=call.teacher,
        CROSS=bool(call.interactive),
        BLOCK_M=block,
        BLOCK_K=128,
        num_warps=4,
        **COMPILE,
    )
    if call.ids is None:
        rows[RowStat.NEGATIVES].fill_(m - 1)
        return
    _similarity_count_kernel[(-(-n // block),)](
        call.ids,
        call.text_ids,
        rows,
        n,
        m,
        call.label_offset,
        BLOCK_M=block,
        BLOCK_N=256,
        num_warps=4,
        **COMPILE,
    )
