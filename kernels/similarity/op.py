"""Launchers of similarity_loss's Triton kernels, which compute the results of simplclip.ops.similarity.reference.

tile.py: a tile of a product. forward.py, merge.py: statistics. backward.py: gradients to the matrices. launch.py: the
constants of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import COMPILE, architecture_and_processors, device_of, precision_of, splits, started, starts
from simplclip.kernels.similarity.backward import SUMS, _similarity_gradient_kernel
from simplclip.kernels.similarity.forward import _similarity_statistics_kernel
from simplclip.kernels.similarity.gradients import ImageGradient, TextGradient, range_factors
from simplclip.kernels.similarity.launch import STUDENTS, Launch, Slots, Tiling, launches
from simplclip.kernels.similarity.merge import _similarity_diagonal_kernel, _similarity_merge_kernel
from simplclip.kernels.similarity.tile import Pairs, Sigmoids
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall, SimilarityGradient

GROUP = 8  # blocks of rows that use the same column tiles while those are in the cache
# Blocks of the small kernels, which need no table.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64}
MERGE_WARPS = 8
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}
_COLUMN_LSES = {
    "HAS_TEACHER": ColumnStat.LSE_TEACHER,
    "HAS_TEACHER_TO_TEXT": ColumnStat.LSE_TEACHER_TO_TEXT,
    "HAS_STUDENT": ColumnStat.LSE_STUDENT,
}


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's statistics: rows [11, N], columns [5, M], and an unused tensor of the shape of the stored rows.

    Scratch besides the results: the parts of column statistics, at most as many bytes as `chunk` rows of one matrix (or one
    block of rows' parts), and those of row statistics.
    """
    with device_of(call.image):
        rows, columns = statistics(call)
    shape = call.matrices if call.stored_rows else 0, call.stored_rows, call.text.shape[0]
    return rows, columns, call.image.new_empty(shape)


_GIVEN = ("image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale", "cross_scale", "label_offset")


def arguments(call: SimilarityCall, launch: Launch, tile: tuning.Tile) -> dict[str, object]:
    """Arguments of both large kernels."""
    width = call.image.shape[1]
    teacher_width = width if call.teacher_image is None else call.teacher_image.shape[1]
    return {
        **{name: getattr(call, name) for name in _GIVEN},
        "projected_image": call.student_image if call.interactive else None,
        "projected_text": call.student_text if call.interactive else None,
        "sigmoids": Sigmoids(call.sigmoid_weight, call.sigmoid_bias, call.sigmoid_negative, call.sigmoid_positive),
        "pairs": Pairs.of(call),
        "n": call.image.shape[0],
        "m": call.text.shape[0],
        "width": width,
        "teacher_width": teacher_width,
        "LAUNCH": launch,
        "TILE": Tiling.of(tile, width, teacher_width, precision_of(call.image.dtype)),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **COMPILE,
    }


def statistics(call: SimilarityCall) -> tuple[Tensor, Tensor]:  # [11, N], [5, M]
    n, m, image = call.image.shape[0], call.text.shape[0], call.image
    rows = torch.zeros(len(RowStat), n, dtype=torch.float32, device=image.device)
    columns = torch.zeros(len(ColumnStat), m, dtype=torch.float32, device=image.device)
    precision, (architecture, processors) = precision_of(image.dtype), architecture_and_processors(image)
    _positives(call, rows)
    for launch in launches(call):
        tile = tuning.lookup(*launch.entry(backward=False), precision, architecture)
        slots = Slots.of(launch)
        blocks = -(-n // tile.block_m)
        if launch.COLUMNS:
            blocks = min(blocks, max(1, call.chunk * image.dtype.itemsize // (4 * slots.COLUMNS)))
            for flag, stat in _COLUMN_LSES.items():  # start with no rows; the parts of each range of rows are merged below
                if getattr(launch, flag):
                    columns[stat].fill_(-torch.inf)
        for first in starts(n, blocks * tile.block_m):
            count = min(n - first, blocks * tile.block_m)
            row_blocks = -(-count // tile.block_m)
            tiles = -(-m // tile.block_n)
            ranges, per_split = splits(row_blocks, tiles, processors * tile.blocks)
            row_parts = rows.new_empty(ranges, slots.ROWS, count)
            column_parts = columns.new_empty(row_blocks, slots.COLUMNS, m) if launch.COLUMNS else None
            started(_similarity_statistics_kernel)[(row_blocks * ranges,)](
                **arguments(call, launch, tile), SLOTS=slots, GROUP=GROUP, row_parts=row_parts, column_parts=column_parts,
                entropy=float(call.entropy), first_row=first, row_count=count, row_blocks=row_blocks, splits=ranges,
                tiles_per_split=per_split,
            )  # fmt: skip
            _merge(launch, slots, row_parts, rows, first, of_rows=True)
            if launch.COLUMNS:
                _merge(launch, slots, column_parts, columns, 0, of_rows=False)
    return rows, columns


def _merge(
    launch: Launch,
    slots: Slots,
    parts: Tensor,  # [parts, slots, size]
    out: Tensor,  # [11, N] or [5, M]
    first: int,
    *,
    of_rows: bool,
) -> None:
    count, _, size = parts.shape
    started(_similarity_merge_kernel)[(-(-size // MERGE["BLOCK"]),)](
        parts, out, size, count, out.shape[1], first, launch, slots, of_rows, **MERGE, num_warps=MERGE_WARPS, **COMPILE
    )


def _positives(call: SimilarityCall, rows: Tensor) -> None:  # [11, N]
    """The similarities of the positives."""
    n = call.image.shape[0]
    for asked, stat, image, text in (
        (call.softmax, RowStat.DIAGONAL_STUDENT, call.image, call.text),
        (call.has_teacher, RowStat.DIAGONAL_TEACHER, call.teacher_image, call.teacher_text),
        (call.interactive, RowStat.DIAGONAL_IMAGE_TO_TEACHER, call.student_image, call.teacher_text),
        (call.has_teacher_to_text, RowStat.DIAGONAL_TEACHER_TO_TEXT, call.teacher_image, call.student_text),
    ):
        if asked:
            started(_similarity_diagonal_kernel)[(-(-n // DIAGONAL["BLOCK_M"]),)](
                image, text, rows[stat], n, image.shape[1], call.label_offset, **DIAGONAL, num_warps=4, **COMPILE
            )


def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, ...]:
    """The reference's gradients. For each chunk of rows a kernel computes G of the student's matrices, then two
    products follow for each matrix.

    Scratch besides the results: `chunk` rows of each student's matrix of a launch; for half types also a float32 sum of the
    text's gradient and one product that is added to it.
    """
    with device_of(call.image):
        return _gradients(call)


def gradient_plan(call: SimilarityCall) -> tuple[list[tuple[Launch, tuning.Tile]], Tensor, Tensor]:
    """The launches with their tiles, scratch [matrices, chunk, M or more] for the gradients of a chunk, and programs' sums
    of the scalars' gradients."""
    precision, (architecture, _) = precision_of(call.image.dtype), architecture_and_processors(call.image)
    plan = [(x, tuning.lookup(*x.entry(backward=True), precision, architecture)) for x in launches(call)]
    rows, m = min(call.image.shape[0], call.chunk), call.text.shape[0]
    pitch = -(-m // 8) * 8  # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
    scratch = call.image.new_empty(max(launch.students for launch, _ in plan), rows, pitch)
    programs = max(-(-rows // tile.block_m) * -(-m // tile.block_n) for _, tile in plan)
    return plan, scratch, torch.zeros(programs, SUMS, dtype=torch.float32, device=scratch.device)


def gradients_of_matrices(
    call: SimilarityGradient,
    launch: Launch,
    tile: tuning.Tile,
    factors: Tensor | None,  # [matrices]
    scratch: Tensor,  # [matrices, chunk, M and more]
    sums: Tensor,  # [programs, SUMS]
    at: slice,
    attend: bool = False,
) -> None:
    """Writes the gradients of some rows of a launch's matrices to scratch."""
    count, m = at.stop - at.start, call.text.shape[0]
    row_blocks = -(-count // tile.block_m)
    started(_similarity_gradient_kernel)[(row_blocks * -(-m // tile.block_n),)](
        **arguments(call, launch, tile), ATTEND=attend, rows=call.row_stats, columns=call.column_stats,
        grad_rows=call.grad_rows, grad_columns=call.grad_columns, factors=factors, out=scratch, sums=sums,
        first_row=at.start, row_count=count, row_blocks=row_blocks, out_stride=scratch.stride(1),
        matrix_stride=scratch.stride(0),
    )  # fmt: skip


def _gradients(call: SimilarityGradient) -> tuple[Tensor, ...]:
    n, m = call.image.shape[0], call.text.shape[0]
    own_image, own_text = call.projected_image is None, call.projected_text is None
    pieces = -(-n // call.chunk)
    d_image = ImageGradient(call.image, call.softmax + call.interactive * own_image, call.need_image)
    d_text = TextGradient(call.text, pieces * (call.softmax + call.has_teacher_to_text * own_text), call.need_text)
    d_projected_image = d_image if own_image else ImageGradient(call.projected_image, call.interactive)
    d_projected_text = d_text if own_text else TextGradient(call.projected_text, pieces * call.has_teacher_to_text)
    plan, scratch, sums = gradient_plan(call)
    factors = [range_factors(call, launch) for launch, _ in plan]

    for first in starts(n, call.chunk):
        at = slice(first, min(n, first + call.chunk))
        for (launch, tile), factor in zip(plan, factors):
            gradients_of_matrices(call, launch, tile, factor, scratch, sums, at)
            flags = [flag for flag in STUDENTS if getattr(launch, flag)]
            undo = [None] * len(flags) if factor is None else 1 / factor
            for flag, g, back in zip(flags, scratch[:, : at.stop - first, :m], undo):
                if flag == "HAS_STUDENT":
                    d_image.add(at, g, call.text, back)
                    d_text.add(g.T, call.image[at], back)
                elif flag == "HAS_IMAGE_TO_TEACHER":
                    d_projected_image.add(at, g, call.teacher_text, back)
                else:
                    d_projected_text.add(g.T, call.teacher_image[at], back)
        d_image.flush(at)
        d_projected_image.flush(at)

    total = sums.sum(0)
    d_scale, d_cross = torch.unbind_copy(total[:2])  # results of an op must not share memory
    d_sigmoids = total[2 : 2 + 2 * call.sigmoids].view(-1, 2)
    return (
        d_image.result(),
        d_text.result(),
        d_scale,
        call.image.new_empty(0, call.image.shape[1]) if own_image else d_projected_image.result(),
        call.text.new_empty(0, call.text.shape[1]) if own_text else d_projected_text.result(),
        d_cross,
        d_sigmoids[:, 0].clone(),
        d_sigmoids[:, 1].clone(),
    )
