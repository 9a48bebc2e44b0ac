"""Sizes and constants of the similarity kernels' launches: tiles, ranges of rows in forward, blocks
of G in backward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from simplclip.calls.similarity import SigmoidCall, SimilarityCall
from simplclip.kernels import tuning
from simplclip.kernels.runtime import card, precision_of, splits

# sides of a block of G are multiples of 128, and so of a tile's sides, unless they end with the
# matrix
SIDE = 128
ROW_SLOTS = 6  # statistics of a row in forward's parts


# parts of a call by which tiles differ, and the field that is None without one
PARTS = {"teacher": "teacher_image", "plane": "plane", "ids": "ids"}


def tile_of(call: SimilarityCall | SigmoidCall, kernel: str) -> tuning.Tile:
    """Returns the tile of a kernel for this call: "statistics", "gradient" or "sigmoid"."""
    architecture = card(call.image).architecture
    parts = [part for part, field in PARTS.items() if getattr(call, field, None) is not None]
    return tuning.lookup(precision_of(call.image.dtype), architecture, kernel, *parts)


def sizes(
    call: SimilarityCall | SigmoidCall, tile: tuning.Tile, **teacher_width: int
) -> dict[str, Any]:
    """Returns what every kernel that multiplies features takes beside the call's fields: sizes,
    the tile, and options.

    teacher_width: of the teacher's features or 0, if the kernel multiplies them too.
    """
    n, width = call.image.shape
    precision = precision_of(call.image.dtype)
    tiling = tile.tiling(precision, width, *teacher_width.values())
    given = {"n": n, "m": call.text.shape[0], "width": width, **teacher_width}
    return {**given, "TILE": tiling, **tile.options()}


def column_slots(call: SimilarityCall) -> int:
    """Returns the numbers kept of a column in forward's parts: 5 with a teacher, else 2."""
    return 5 if call.has_teacher else 2


class Sweep(NamedTuple):
    """A range of rows whose statistics one launch of forward computes."""

    first_row: int
    row_count: int
    row_blocks: int
    splits: int  # the columns are divided into so many ranges
    tiles_per_split: int


def sweeps(call: SimilarityCall, tile: tuning.Tile) -> Iterator[Sweep]:
    """Yields the ranges of rows, from row 0 to N, one for each launch of forward.

    A sweep's parts of columns have at most as many bytes as `chunk` rows of a matrix, or are those
    of one block of rows. Each program reads its rows once for each tile of columns, so that columns
    have so many ranges that the rows of all programs at a time fit half of the L2 cache.
    """
    gpu = card(call.image)
    n = call.image.shape[0]
    m = call.text.shape[0]
    blocks = -(-n // tile.block_m)
    if call.columns:
        blocks = min(blocks, max(1, call.chunk * call.image.itemsize // (4 * column_slots(call))))
    tiles = -(-m // tile.block_n)
    slots = gpu.processors * tile.blocks
    features = (call.image, call.teacher_image)
    row_bytes = sum(each.shape[1] * each.itemsize for each in features if each is not None)
    half = gpu.cache // 2
    # a driver may report no cache
    least = -(-slots * tile.block_m * row_bytes // half) if half else 1
    for first in range(0, n, blocks * tile.block_m):
        count = min(n - first, blocks * tile.block_m)
        row_blocks = -(-count // tile.block_m)
        yield Sweep(first, count, row_blocks, *splits(row_blocks, tiles, slots, least))


@functools.cache
def block_sides(n: int, m: int, elements: int, width: int, processors: int) -> tuple[int, int]:
    """Returns rows R and columns C, R C at most `elements` or 128², of backward's blocks. Cached.

    The cost is that of the products [R, C] [C, D] and [C, R] [R, D], in rounds of cuBLAS's tiles of
    128², each as long as its sum, and that of gradients, of which a block reads and writes
    8 D (R + C) bytes: a byte takes as long as about 64 multiply-adds. It is the sum of a cost of R
    and a cost of C.
    """

    def costs(size: int, other: int) -> dict[int, float]:
        """Returns the cost of each side, for a gradient [size, D] of sums over `other` numbers."""
        across = -(-width // SIDE)
        found = {}
        for side in (*range(SIDE, size, SIDE), size):
            whole, rest = divmod(size, side)
            rounds = whole * -(-(-(-side // SIDE) * across) // processors)
            rounds += -(-(-(-rest // SIDE) * across) // processors)
            traffic = width * -(-size // side) / (32 * processors)
            found[side] = other * (rounds + traffic)
        return found

    elements = max(elements, SIDE * SIDE)
    of_rows = costs(n, m)
    of_columns = costs(m, n)
    # of the first sides of columns, by their number
    best = [*itertools.accumulate(of_columns, lambda *two: min(two, key=of_columns.__getitem__))]
    found = {}
    for rows, cost in of_rows.items():
        most = elements // rows
        if most >= min(m, SIDE):
            columns = best[-1 if most >= m else most // SIDE - 1]
            found[rows, columns] = cost + of_columns[columns]
    return min(found, key=found.__getitem__)


def blocks_of(n: int, m: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yields (row slice, column slice) of each block of an n x m matrix, by rows of blocks."""
    for row in range(0, n, rows):
        for column in range(0, m, columns):
            yield slice(row, min(n, row + rows)), slice(column, min(m, column + columns))
