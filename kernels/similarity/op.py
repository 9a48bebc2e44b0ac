"""Launchers of similarity_loss's Triton kernels: what simplclip.ops.similarity.reference defines, without a matrix of N×M.

similarity_tile: a tile of a product. similarity_forward, similarity_merge: statistics. similarity_backward: gradients to the
planes. launch.py: which planes share a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import COMPILE, architecture_and_processors, device_of, precision_of, splits, started, starts
from simplclip.kernels.similarity.backward import SUMS, _similarity_gradient_kernel
from simplclip.kernels.similarity.forward import _similarity_statistics_kernel
from simplclip.kernels.similarity.gradients import ImageGradient, TextGradient, range_factors, wide_product
from simplclip.kernels.similarity.launch import Call, Launch, arguments, launches
from simplclip.kernels.similarity.merge import (
    _similarity_count_kernel,
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
)
from simplclip.ops.similarity.call import ColumnStat, RowStat

GROUP = 8  # blocks of rows that share column tiles while those are in the cache
# The small kernels' blocks; not worth a table.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64}
MERGE_WARPS = 8
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}
COUNT = {"BLOCK_M": 16, "BLOCK_N": 256}


def similarity_loss_fwd(*args):
    """The reference's statistics: rows [12, N], columns [6, M], and an unused tensor of the shape that was asked for.

    Scratch beside the results: the parts of column statistics, at most as many bytes as `chunk` rows of one plane (or one
    block of rows' parts), and those of row statistics.
    """
    *shared, chunk, stored_rows = args
    call = Call(*shared)
    with device_of(call.image):
        rows, columns = statistics(call, launches(call), chunk)
    planes = call.similarity + call.teacher + call.interactive * (1 + call.columns)
    return rows, columns, call.image.new_empty(planes if stored_rows else 0, stored_rows, call.text.shape[0])


def statistics(call: Call, plan: list[Launch], chunk: int) -> tuple[Tensor, Tensor]:  # [12, N], [6, M]
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
            blocks = min(blocks, max(1, chunk * image.dtype.itemsize // (4 * slots["COLUMN_SLOTS"])))
            for stat in launch.column_lses():
                columns[stat].fill_(-torch.inf)  # over no rows yet; the parts of each group of rows are added
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
        **{name: slots[name] for name in ("T_AT", "X_AT", "Z_AT", "MATCH_AT")},
        SLOTS=parts.shape[1],
        PREVIOUS=not of_rows,
        **MERGE,
        num_warps=MERGE_WARPS,
        **COMPILE,
    )


def _positives(call: Call, plan: list[Launch], rows: Tensor) -> None:  # [12, N]
    n, m = call.image.shape[0], call.text.shape[0]
    started(_similarity_diagonal_kernel)[(-(-n // DIAGONAL["BLOCK_M"]),)](
        **call.features(),
        plane_weight=call.plane_weight,
        rows_out=rows,
        n=n,
        **call.widths(),
        label_offset=call.label_offset,
        **{name: any(getattr(launch, name) for launch in plan) for name in "ZLTUV"},
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


def similarity_loss_bwd(
    grad_rows: Tensor,  # [12, N]
    grad_columns: Tensor,  # [6, M]
    *args,
):
    """The reference's gradients. Each chunk of rows: G of each student plane by one kernel, then two products per plane.

    Scratch beside the results: `chunk` rows of each student plane of a launch, for halves a float32 sum of the text's
    gradient and one product that is added to it.
    """
    *shared, rows, columns, _stored, label_offset, softmax, columns_too, negatives, relational, interactive, entropy = args[
        :-3
    ]
    call = Call(*shared, label_offset, softmax, columns_too, negatives, relational, interactive, entropy)
    with device_of(call.image):
        return _gradients(call, grad_rows, grad_columns, rows, columns, *args[-3:])


def gradient_scratch(call: Call, plan: list[Launch], tiles: list[tuning.Tile], chunk: int) -> tuple[Tensor, Tensor]:
    """[planes, chunk, M and more] for the gradients of a chunk, and every program's sums of the scalars'."""
    rows, m = min(call.image.shape[0], chunk), call.text.shape[0]
    pitch = -(-m // 8) * 8  # rows that begin at multiples of 16 bytes, which the BLAS's fast kernels need
    scratch = call.image.new_empty(max(launch.students for launch in plan), rows, pitch)
    programs = max(-(-rows // tile.block_m) * -(-m // tile.block_n) for tile in tiles)
    return scratch, torch.zeros(programs, SUMS, dtype=torch.float32, device=scratch.device)


def gradients_of_planes(
    call: Call,
    launch: Launch,
    tile: tuning.Tile,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],  # rows, columns, and the gradients to them
    factors: Tensor | None,  # [planes]
    scratch: Tensor,  # [planes, chunk, M and more]
    sums: Tensor,  # [programs, 4]
    at: slice,
    attend: bool = False,
) -> None:
    """The gradients of some rows of a launch's planes, into scratch."""
    count, m = at.stop - at.start, call.text.shape[0]
    row_blocks = -(-count // tile.block_m)
    started(_similarity_gradient_kernel)[(row_blocks * -(-m // tile.block_n),)](
        **arguments(call, launch, tile, precision_of(call.image.dtype)),
        **dict(zip(("rows", "columns", "grad_rows", "grad_columns"), statistics)),
        factors=factors,
        out=scratch,
        sums=sums,
        first_row=at.start,
        row_count=count,
        row_blocks=row_blocks,
        out_stride=scratch.stride(1),
        plane_stride=scratch.stride(0),
        SCALED=factors is not None,
        ATTEND=attend,
    )


def _gradients(call, grad_rows, grad_columns, rows, columns, need_image, need_text, chunk):
    n, m, like = call.image.shape[0], call.text.shape[0], call.image
    features, precision = call.features(), precision_of(like.dtype)
    architecture, _ = architecture_and_processors(like)
    plan = launches(call)
    pieces = -(-n // chunk)

    def planes_of(*names):
        return sum(bool(getattr(launch, name)) for launch in plan for name in names)

    own_image, own_text = call.projected_image is None, call.projected_text is None
    d_image = ImageGradient(call.image, planes_of("Z", "L", *("U" if own_image else "")), need_image)
    d_text = TextGradient(call.text, pieces * planes_of("Z", "L", *("V" if own_text else "")), need_text)
    d_projected_image = d_image if own_image else ImageGradient(call.projected_image, planes_of("U"))
    d_projected_text = d_text if own_text else TextGradient(call.projected_text, pieces * planes_of("V"))
    d_weight = None if call.plane_weight is None else torch.zeros_like(call.plane_weight)
    weighted = (call.image * call.plane_weight).to(like.dtype) if call.hadamard else None

    tiles = [tuning.lookup("similarity_backward", launch.gradient_tiles, precision, architecture) for launch in plan]
    factors = [range_factors(call, launch, grad_rows, grad_columns) for launch in plan]
    scratch, sums = gradient_scratch(call, plan, tiles, chunk)

    for first in starts(n, chunk):
        at = slice(first, min(n, first + chunk))
        for launch, tile, factor in zip(plan, tiles, factors):
            gradients_of_planes(call, launch, tile, (rows, columns, grad_rows, grad_columns), factor, scratch, sums, at)
            g = dict(zip((name for name in "ZLUV" if getattr(launch, name)), scratch[:, : at.stop - first, :m]))
            undo = dict(zip(g, [None] * len(g) if factor is None else 1 / factor))
            if "Z" in g:
                d_image.add(at, g["Z"], call.text, undo["Z"])
                d_text.add(g["Z"].T, call.image[at], undo["Z"])
            if "L" in g:
                product = wide_product(g["L"], call.text, undo["L"])
                d_weight += (call.image[at] * product).sum(0)
                d_image.add_product(at, product.mul_(call.plane_weight))
                d_text.add(g["L"].T, weighted[at], undo["L"])
            if "U" in g:
                d_projected_image.add(at, g["U"], features["teacher_text"], undo["U"])
            if "V" in g:
                d_projected_text.add(g["V"].T, features["teacher_image"][at], undo["V"])
        d_image.flush(at)
        d_projected_image.flush(at)

    d_scale, d_cross, d_slope, d_bias = torch.unbind_copy(sums.sum(0))  # an op's results share no memory
    if d_weight is not None and d_weight.dim() == 0:
        d_weight = d_slope
    return (
        d_image.result(),
        d_text.result(),
        d_scale,
        call.image.new_empty(0, call.image.shape[1]) if own_image else d_projected_image.result(),
        call.text.new_empty(0, call.text.shape[1]) if own_text else d_projected_text.result(),
        d_cross,
        grad_rows.new_empty(0) if d_weight is None else d_weight,
        d_bias,
    )
