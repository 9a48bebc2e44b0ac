"""Launchers of similarity_loss's Triton kernels, which compute the results of simplclip.ops.similarity.reference.

tile.py: a tile of a product. forward.py, merge.py: statistics. backward.py: gradients to the matrices. launch.py: which
matrices share a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import COMPILE, architecture_and_processors, device_of, precision_of, splits, started, starts
from simplclip.kernels.similarity.backward import SUMS, _similarity_gradient_kernel
from simplclip.kernels.similarity.forward import _similarity_statistics_kernel
from simplclip.kernels.similarity.gradients import ImageGradient, TextGradient, range_factors, wide_product
from simplclip.kernels.similarity.launch import STUDENTS, Launch, arguments, features, launches, widths
from simplclip.kernels.similarity.merge import (
    _similarity_count_kernel,
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
)
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall, SimilarityGradient

GROUP = 8  # blocks of rows that use the same column tiles while those are in the cache
# Blocks of the small kernels, which need no table.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64}
MERGE_WARPS = 8
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}
COUNT = {"BLOCK_M": 16, "BLOCK_N": 256}


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's statistics: rows [12, N], columns [6, M], and an unused tensor of the shape of the stored rows.

    Scratch besides the results: the parts of column statistics, at most as many bytes as `chunk` rows of one matrix (or one
    block of rows' parts), and those of row statistics.
    """
    with device_of(call.image):
        rows, columns = statistics(call, launches(call))
    shape = call.matrices if call.stored_rows else 0, call.stored_rows, call.text.shape[0]
    return rows, columns, call.image.new_empty(shape)


def statistics(call: SimilarityCall, plan: list[Launch]) -> tuple[Tensor, Tensor]:  # [12, N], [6, M]
    n, m, image = call.image.shape[0], call.text.shape[0], call.image
    rows = torch.zeros(len(RowStat), n, dtype=torch.float32, device=image.device)
    columns = torch.zeros(len(ColumnStat), m, dtype=torch.float32, device=image.device)
    precision = precision_of(image.dtype)
    architecture, processors = architecture_and_processors(image)
    _positives(call, plan, rows)
    for launch in plan:
        tile = tuning.lookup("similarity_forward", launch.statistics_tiles, precision, architecture)
        slots = launch.slots()
        blocks = -(-n // tile.block_m)
        if launch.COLUMNS:
            blocks = min(blocks, max(1, call.chunk * image.dtype.itemsize // (4 * slots["COLUMN_SLOTS"])))
            for stat in launch.column_lses():
                columns[stat].fill_(-torch.inf)  # of no rows; the parts of each group of rows are added below
        for first in starts(n, blocks * tile.block_m):
            count = min(n - first, blocks * tile.block_m)
            row_blocks = -(-count // tile.block_m)
            tiles = -(-m // tile.block_n)
            ranges, per_split = splits(row_blocks, tiles, processors * tile.blocks)
            row_parts = rows.new_empty(ranges, slots["ROW_SLOTS"], count)
            column_parts = columns.new_empty(row_blocks, slots["COLUMN_SLOTS"], m) if launch.COLUMNS else None
            started(_similarity_statistics_kernel)[(row_blocks * ranges,)](
                **arguments(call, launch, tile, precision),
                **slots,
                row_parts=row_parts,
                column_parts=column_parts,
                entropy=float(call.entropy),
                first_row=first,
                row_count=count,
                row_blocks=row_blocks,
                splits=ranges,
                tiles_per_split=per_split,
                GROUP=GROUP,
            )
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
    size = parts.shape[2]
    started(_similarity_merge_kernel)[(-(-size // MERGE["BLOCK"]),)](
        parts,
        out,
        size,
        parts.shape[0],
        out.shape[1],
        first,
        **launch.constants_of_merge(of_rows),
        **{name: slots[name] for name in ("TEACHER_AT", "CROSS_AT", "STUDENT_AT", "PAIR_MATCHING_AT")},
        SLOTS=parts.shape[1],
        PREVIOUS=not of_rows,
        **MERGE,
        num_warps=MERGE_WARPS,
        **COMPILE,
    )


def _positives(call: SimilarityCall, plan: list[Launch], rows: Tensor) -> None:  # [12, N]
    n, m = call.image.shape[0], call.text.shape[0]
    started(_similarity_diagonal_kernel)[(-(-n // DIAGONAL["BLOCK_M"]),)](
        **features(call),
        plane_weight=call.plane_weight,
        rows_out=rows,
        n=n,
        **widths(call),
        label_offset=call.label_offset,
        **{name: any(getattr(launch, name) for launch in plan) for name in ("HAS_TEACHER", *STUDENTS)},
        **DIAGONAL,
        num_warps=4,
        **COMPILE,
    )
    if call.ids is None:
        rows[RowStat.NEGATIVES].fill_(m - 1)
        return
    started(_similarity_count_kernel)[(-(-n // COUNT["BLOCK_M"]),)](
        call.ids,
        call.text_ids,
        rows,
        n,
        m,
        call.label_offset,
        **COUNT,
        num_warps=4,
        **COMPILE,
    )


def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, ...]:
    """The reference's gradients. For each chunk of rows a kernel computes G of the student's matrices, then two
    products follow for each matrix.

    Scratch besides the results: `chunk` rows of each student's matrix of a launch; for half types also a float32 sum of the
    text's gradient and one product that is added to it.
    """
    with device_of(call.image):
        return _gradients(call)


def gradient_scratch(call: SimilarityCall, plan: list[Launch], tiles: list[tuning.Tile]) -> tuple[Tensor, Tensor]:
    """Scratch [matrices, chunk, M or more] for the gradients of a chunk, and programs' sums of the scalars' gradients."""
    rows, m = min(call.image.shape[0], call.chunk), call.text.shape[0]
    pitch = -(-m // 8) * 8  # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    scratch = call.image.new_empty(max(launch.students for launch in plan), rows, pitch)
    programs = max(-(-rows // tile.block_m) * -(-m // tile.block_n) for tile in tiles)
    return scratch, torch.zeros(programs, SUMS, dtype=torch.float32, device=scratch.device)


def gradients_of_matrices(
    call: SimilarityGradient,
    launch: Launch,
    tile: tuning.Tile,
    factors: Tensor | None,  # [matrices]
    scratch: Tensor,  # [matrices, chunk, M and more]
    sums: Tensor,  # [programs, 4]
    at: slice,
    attend: bool = False,
) -> None:
    """Writes the gradients of some rows of a launch's matrices to scratch."""
    count, m = at.stop - at.start, call.text.shape[0]
    row_blocks = -(-count // tile.block_m)
    started(_similarity_gradient_kernel)[(row_blocks * -(-m // tile.block_n),)](
        **arguments(call, launch, tile, precision_of(call.image.dtype)),
        rows=call.row_stats,
        columns=call.column_stats,
        grad_rows=call.grad_rows,
        grad_columns=call.grad_columns,
        factors=factors,
        out=scratch,
        sums=sums,
        first_row=at.start,
        row_count=count,
        row_blocks=row_blocks,
        out_stride=scratch.stride(1),
        matrix_stride=scratch.stride(0),
        SCALED=factors is not None,
        ATTEND=attend,
    )


def _gradients(call: SimilarityGradient) -> tuple[Tensor, ...]:
    n, m, like = call.image.shape[0], call.text.shape[0], call.image
    precision, (architecture, _) = precision_of(like.dtype), architecture_and_processors(like)
    plan = launches(call)
    pieces = -(-n // call.chunk)

    def count(*flags):
        return sum(bool(getattr(launch, flag)) for launch in plan for flag in flags)

    own = ("HAS_STUDENT", "HAS_HADAMARD")
    own_image, own_text = call.projected_image is None, call.projected_text is None
    of_image, of_text = count("HAS_IMAGE_TO_TEACHER"), count("HAS_TEACHER_TO_TEXT")
    d_image = ImageGradient(call.image, count(*own) + of_image * own_image, call.need_image)
    d_text = TextGradient(call.text, pieces * (count(*own) + of_text * own_text), call.need_text)
    d_projected_image = d_image if own_image else ImageGradient(call.projected_image, of_image)
    d_projected_text = d_text if own_text else TextGradient(call.projected_text, pieces * of_text)
    d_weight = None if call.plane_weight is None else torch.zeros_like(call.plane_weight)
    weighted = (call.image * call.plane_weight).to(like.dtype) if call.has_hadamard else None

    tiles = [tuning.lookup("similarity_backward", launch.gradient_tiles, precision, architecture) for launch in plan]
    factors = [range_factors(call, launch) for launch in plan]
    scratch, sums = gradient_scratch(call, plan, tiles)

    for first in starts(n, call.chunk):
        at = slice(first, min(n, first + call.chunk))
        for launch, tile, factor in zip(plan, tiles, factors):
            gradients_of_matrices(call, launch, tile, factor, scratch, sums, at)
            flags = [flag for flag in STUDENTS if getattr(launch, flag)]
            undo = [None] * len(flags) if factor is None else 1 / factor
            for flag, g, back in zip(flags, scratch[:, : at.stop - first, :m], undo):
                if flag == "HAS_STUDENT":
                    d_image.add(at, g, call.text, back)
                    d_text.add(g.T, call.image[at], back)
                elif flag == "HAS_HADAMARD":
                    product = wide_product(g, call.text, back)
                    d_weight += (call.image[at] * product).sum(0)
                    d_image.add_product(at, product.mul_(call.plane_weight))
                    d_text.add(g.T, weighted[at], back)
                elif flag == "HAS_IMAGE_TO_TEACHER":
                    d_projected_image.add(at, g, call.teacher_text, back)
                else:
                    d_projected_text.add(g.T, call.teacher_image[at], back)
        d_image.flush(at)
        d_projected_image.flush(at)

    d_scale, d_cross, d_slope, d_bias = torch.unbind_copy(sums.sum(0))  # results of an op must not share memory
    if d_weight is not None and d_weight.dim() == 0:
        d_weight = d_slope
    return (
        d_image.result(),
        d_text.result(),
        d_scale,
        call.image.new_empty(0, call.image.shape[1]) if own_image else d_projected_image.result(),
        call.text.new_empty(0, call.text.shape[1]) if own_text else d_projected_text.result(),
        d_cross,
        call.grad_rows.new_empty(0) if d_weight is None else d_weight,
        d_bias,
    )
