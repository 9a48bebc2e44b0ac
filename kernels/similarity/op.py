"""Launchers of similarity_loss's Triton kernels, which compute the results of simplclip.ops.similarity.reference.

tile.py: a tile of a product. forward.py, merge.py: statistics. backward.py: gradients of the matrices. launch.py: the
constants of the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import (
    COMPILE,
    architecture_and_processors,
    device_of,
    interpreted,
    precision_of,
    splits,
    started,
    starts,
)
from simplclip.kernels.similarity.backward import (
    FACTORS,
    SUMS,
    _similarity_factors_kernel,
    _similarity_gradient_kernel,
    _similarity_kept_kernel,
)
from simplclip.kernels.similarity.forward import _similarity_statistics_kernel
from simplclip.kernels.similarity.gradients import FeatureGradient, range_factor
from simplclip.kernels.similarity.launch import STUDENTS, Launch, Slots, Tiling, block_sides, blocks_of, launches
from simplclip.kernels.similarity.merge import _similarity_diagonal_kernel, _similarity_merge_kernel
from simplclip.kernels.similarity.tile import Pairs, Sigmoids
from simplclip.ops.similarity.call import ColumnStat, RowStat, SimilarityCall, SimilarityGradient, stored_dtype

GROUP = 8  # blocks of rows that use the same column tiles while those are in the cache
# Blocks of the small kernels, which have no tiles in tuning.py.
MERGE = {"BLOCK_PARTS": 16, "BLOCK": 64}
MERGE_WARPS = 8
DIAGONAL = {"BLOCK_M": 16, "BLOCK_K": 128}
NEAR = {"BLOCK": 2048}
KEPT = {"BLOCK_M": 32, "BLOCK_N": 128}
_COLUMN_LSES = {
    "HAS_TEACHER": ColumnStat.LSE_TEACHER,
    "HAS_TEACHER_TO_TEXT": ColumnStat.LSE_TEACHER_TO_TEXT,
    "HAS_STUDENT": ColumnStat.LSE_STUDENT,
}


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the reference's statistics: rows [11, N], columns [5, M]; and exponentials of the first `stored_rows` rows.

    Scratch besides the results: the parts of column statistics, at most as many bytes as `chunk` rows of one matrix (or one
    block of rows' parts), and the parts of row statistics.
    """
    shape = call.matrices if call.stored_rows else 0, call.stored_rows, call.text.shape[0]
    kept = call.image.new_empty(shape, dtype=stored_dtype(call.image.dtype))
    with device_of(call.image):
        rows, columns = statistics(call, kept if call.stored_rows and call.keeps_exponentials else None)
    return rows, columns, kept


_GIVEN = ("image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale", "cross_scale", "label_offset")


def arguments(call: SimilarityCall, launch: Launch, tile: tuning.Tile) -> dict[str, object]:
    """Returns the arguments that the statistics kernel and the gradient kernel have in common."""
    width = call.image.shape[1]
    teacher_width = width if call.teacher_image is None else call.teacher_image.shape[1]
    return {
        **{name: getattr(call, name) for name in _GIVEN},
        "projected_image": call.student_image if call.interactive else None,
        "projected_text": call.student_text if call.interactive else None,
        "sigmoids": Sigmoids.of(call),
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


def statistics(call: SimilarityCall, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [11, N], [5, M]
    n, image = call.image.shape[0], call.image
    rows = torch.zeros(len(RowStat), n, dtype=torch.float32, device=image.device)
    columns = torch.zeros(len(ColumnStat), call.text.shape[0], dtype=torch.float32, device=image.device)
    _positives(call, rows)
    for launch in launches(call):
        for flag, stat in _COLUMN_LSES.items():  # no rows at first; the parts of each range of rows are merged into these
            if launch.COLUMNS and getattr(launch, flag):
                columns[stat].fill_(-torch.inf)
        last = 0 if kept is None else call.stored_rows
        if last:
            _sweep(call, launch, slice(0, last), kept, rows, columns)
        if last < n:
            _sweep(call, launch, slice(last, n), None, rows, columns)
    return rows, columns


def _sweep(call: SimilarityCall, launch: Launch, span: slice, kept: Tensor | None, rows: Tensor, columns: Tensor) -> None:
    """Adds a launch's statistics of some rows; `kept` gets their exponentials."""
    m, image = call.text.shape[0], call.image
    precision, (architecture, processors) = precision_of(image.dtype), architecture_and_processors(image)
    tile = tuning.lookup(*launch.entry(False, kept is not None), precision, architecture)
    slots, tiles = Slots.of(launch), -(-m // tile.block_n)
    blocks = -(-(span.stop - span.start) // tile.block_m)
    if launch.COLUMNS:
        blocks = min(blocks, max(1, call.chunk * image.dtype.itemsize // (4 * slots.COLUMNS)))
    for first in starts(span.stop - span.start, blocks * tile.block_m):
        first += span.start
        count = min(span.stop - first, blocks * tile.block_m)
        row_blocks = -(-count // tile.block_m)
        ranges, per_split = splits(row_blocks, tiles, processors * tile.blocks)
        row_parts = rows.new_empty(ranges, slots.ROWS, count)
        column_parts = columns.new_empty(row_blocks, slots.COLUMNS, m) if launch.COLUMNS else None
        started(_similarity_statistics_kernel)[(row_blocks * ranges,)](
            **arguments(call, launch, tile), SLOTS=slots, GROUP=GROUP, row_parts=row_parts, column_parts=column_parts,
            kept=kept, positives=None if kept is None else rows[RowStat.DIAGONAL_STUDENT], kept_stride=m,
            entropy=float(call.entropy), first_row=first, row_count=count, row_blocks=row_blocks, splits=ranges,
            tiles_per_split=per_split,
        )  # fmt: skip
        _merge(launch, slots, row_parts, rows, first, of_rows=True)
        if launch.COLUMNS:
            _merge(launch, slots, column_parts, columns, 0, of_rows=False)


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
    """Writes the similarities of the positives to `rows`."""
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
    """Returns the reference's gradients. For each block a kernel computes G, the gradients of the loss with respect to the
    student's similarity matrices; then the products with G follow, two for Z, one each for U and V.

    Scratch besides the results: as many elements as `chunk` rows of one matrix; for half types also the gradients in float32.
    """
    with device_of(call.image):
        return _gradients(call)


class Blocks:
    """The blocks of a call's matrices in which backward computes G, and the tensors that all blocks share."""

    def __init__(self, call: SimilarityGradient, attend: bool = False):
        self.call, self.attend, self.n, self.m = call, attend, call.image.shape[0], call.text.shape[0]
        precision, (architecture, _) = precision_of(call.image.dtype), architecture_and_processors(call.image)
        self.plan = [(x, tuning.lookup(*x.entry(backward=True), precision, architecture)) for x in launches(call)]
        matrices = max(launch.students for launch, _ in self.plan)
        self.rows, self.columns = block_sides(self.n, self.m, call.chunk * self.m // matrices)
        pitch = -(-self.columns // 8) * 8  # rows begin at multiples of 16 bytes, which the fast kernels of the BLAS need
        self.scratch = call.image.new_empty(matrices, self.rows, pitch)
        sides = [tile[:2] for _, tile in self.plan] + [tuple(KEPT.values())]
        tiles = max(-(-self.rows // block_m) * -(-self.columns // block_n) for block_m, block_n in sides)
        # Sums of the scalars' gradients, one for each place of a tile in a block, over all blocks.
        self.sums = torch.zeros(tiles, SUMS, dtype=torch.float32, device=call.image.device)
        self.factor, self.back = (None, None) if attend else self._range_factor()
        self.kept_rows = call.stored_rows if call.keeps_exponentials and not attend else 0
        self.factors = None if call.has_teacher else self._softmax_factors()

    def __iter__(self) -> Iterator[tuple[str, slice, slice, Tensor]]:
        """Yields for each block and matrix: its flag in STUDENTS, the rows, the columns, and G, which the next overwrites."""
        kept = self.kept_rows
        for rows, columns in itertools.chain(
            blocks_of(0, kept, self.m, self.rows, self.columns), blocks_of(kept, self.n, self.m, self.rows, self.columns)
        ):
            for launch, tile in self.plan:
                self._compute(launch, tile, rows, columns)
                for flag, g in zip((flag for flag in STUDENTS if getattr(launch, flag)), self.scratch):
                    yield flag, rows, columns, g[: rows.stop - rows.start, : columns.stop - columns.start]

    def _range_factor(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        call = self.call
        launch = Launch(call.softmax, call.interactive, call.sigmoids, RELATIONAL=call.relational, COLUMNS=call.columns)
        names = ("grad_rows", "grad_columns", "scale", "cross_scale")
        given = {name: getattr(call, name) for name in names}
        return range_factor(
            call.image, launch, **given, sigmoids=Sigmoids.of(call), mix=None, pairs=Pairs.of(call), n=self.n, m=self.m
        )

    def _softmax_factors(self) -> Tensor:
        call = self.call
        out = self.sums.new_empty(FACTORS + -(-self.n // 16) * 16 + self.m)
        started(_similarity_factors_kernel)[(1,)](
            call.row_stats, call.column_stats, call.grad_rows, call.grad_columns, call.scale, out, self.n, self.m,
            COLUMNS=call.columns, ATTEND=self.attend, KEPT=self.kept_rows > 0, **NEAR, num_warps=8, **COMPILE,
        )  # fmt: skip
        return out

    def _compute(self, launch: Launch, tile: tuning.Tile, rows: slice, columns: slice) -> None:
        call, row_blocks = self.call, -(-(rows.stop - rows.start) // tile.block_m)
        kept = rows.start < self.kept_rows
        if kept:
            kept_blocks = -(-(rows.stop - rows.start) // KEPT["BLOCK_M"])
            started(_similarity_kept_kernel)[(kept_blocks * -(-(columns.stop - columns.start) // KEPT["BLOCK_N"]),)](
                call.stored, call.row_stats, call.grad_rows, call.scale, self.factors, self.factor, self.scratch, self.sums,
                self.n, self.m, call.label_offset, rows.start, columns.start, kept_blocks, self.m, self.scratch.stride(1),
                COLUMNS=call.columns, INTERPRETED=interpreted(), **KEPT, num_warps=4, **COMPILE,
            )  # fmt: skip
        started(_similarity_gradient_kernel)[(row_blocks * -(-(columns.stop - columns.start) // tile.block_n),)](
            **arguments(call, launch, tile), ATTEND=self.attend, KEPT=kept, rows=call.row_stats, columns=call.column_stats,
            grad_rows=call.grad_rows, grad_columns=call.grad_columns,
            factors=self.factors if launch.HAS_STUDENT else None, factor=self.factor, out=self.scratch, sums=self.sums,
            first_row=rows.start, first_column=columns.start, row_blocks=row_blocks, out_stride=self.scratch.stride(1),
            matrix_stride=self.scratch.stride(0),
        )  # fmt: skip


def _gradients(call: SimilarityGradient) -> tuple[Tensor, ...]:
    own_image, own_text = call.projected_image is None, call.projected_text is None
    d_image, d_text = FeatureGradient(call.image, call.need_image), FeatureGradient(call.text, call.need_text)
    d_projected_image = d_image if own_image else FeatureGradient(call.projected_image)
    d_projected_text = d_text if own_text else FeatureGradient(call.projected_text)
    blocks = Blocks(call)
    for flag, rows, columns, g in blocks:
        if flag == "HAS_STUDENT":
            d_image.add(rows, g, call.text[columns])
            d_text.add(columns, g.T, call.image[rows])
        elif flag == "HAS_IMAGE_TO_TEACHER":
            d_projected_image.add(rows, g, call.teacher_text[columns])
        else:
            d_projected_text.add(columns, g.T, call.teacher_image[rows])
    back, total = blocks.back, blocks.sums.sum(0)
    del blocks, g  # the scratch, before the results in the features' dtype
    d_scale, d_cross = torch.unbind_copy(total[:2])  # results of an op must not share memory
    d_sigmoids = total[2 : 2 + 2 * call.sigmoids].view(-1, 2)
    return (
        d_image.result(back),
        d_text.result(back),
        d_scale,
        call.image.new_empty(0, call.image.shape[1]) if own_image else d_projected_image.result(back),
        call.text.new_empty(0, call.text.shape[1]) if own_text else d_projected_text.result(back),
        d_cross,
        d_sigmoids[:, 0].clone(),
        d_sigmoids[:, 1].clone(),
    )
