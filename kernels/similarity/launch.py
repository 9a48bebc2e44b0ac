"""Constants of a launch of similarity_loss's kernels: matrices, slots of statistics, tiles, blocks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from simplclip.kernels import tuning
from simplclip.kernels.launch import interpreted, starts
from simplclip.ops.similarity.call import SimilarityCall

SIDE = 128  # sides of a block of G are multiples of 128, and so of a tile's sides, unless they end with the matrix
STUDENTS = ("HAS_STUDENT", "HAS_IMAGE_TO_TEACHER", "HAS_TEACHER_TO_TEXT")  # matrices with a gradient


@dataclass(frozen=True)
class Launch:
    """The matrices that one launch multiplies, and the statistics that it computes."""

    HAS_STUDENT: bool = False
    HAS_IMAGE_TO_TEACHER: bool = False
    SIGMOIDS: int = 0  # the number of sigmoid terms
    HAS_SHARES: bool = False  # of several positives
    RELATIONAL: bool = False
    COLUMNS: bool = False
    DROP_IDS: bool = False  # whether pairs with equal ids drop out of the softmaxes

    @property
    def HAS_TEACHER(self) -> bool:
        return self.RELATIONAL or self.HAS_IMAGE_TO_TEACHER

    @property
    def HAS_TEACHER_TO_TEXT(self) -> bool:
        return self.HAS_IMAGE_TO_TEACHER and self.COLUMNS

    @property
    def students(self) -> int:
        """The number of matrices with a gradient."""
        return sum(getattr(self, name) for name in STUDENTS)

    @property
    def tiles(self) -> int:
        """The number of matrices, by which tiles are tuned. The teacher's means with two students count as four."""
        return max(self.students + self.HAS_TEACHER, 4 * (self.RELATIONAL and self.HAS_IMAGE_TO_TEACHER))

    def entry(self, backward: bool, kept: bool = False) -> tuple[str, int]:
        """Returns the op and the entry in its row of the table of tiles. `kept`: whether forward keeps exponentials."""
        if kept and not backward:
            return "similarity_forward_kept", 1
        op = f"similarity_{'backward' if backward else 'forward'}"
        if self.SIGMOIDS:
            rows_alone = not (backward or self.COLUMNS)  # takes more registers than rows with columns
            return f"{op}_sigmoid", 3 if self.HAS_SHARES else 2 if rows_alone else self.SIGMOIDS
        return op, self.tiles


@dataclass(frozen=True)
class Slots:
    """Indices of the statistics in forward's parts, in the same order for rows and columns, and their numbers.

    A softmax has its maximum, its sum and its means. The kernels read no index from a property of Launch, since Triton's
    cache identifies a constant by its repr, in which properties do not appear.
    """

    TEACHER: int
    MEAN_STUDENT: int
    MEAN_CROSS: int
    CROSS: int
    STUDENT: int
    SIGMOID: int
    ROWS: int
    COLUMNS: int

    @classmethod
    def of(cls, launch: Launch) -> Slots:
        mean_cross = 2 + launch.RELATIONAL
        cross = mean_cross + launch.HAS_IMAGE_TO_TEACHER if launch.HAS_TEACHER else 0
        student = cross + 2 * launch.HAS_IMAGE_TO_TEACHER
        columns = student + 2 * launch.HAS_STUDENT
        return cls(0, 2, mean_cross, cross, student, columns, columns + launch.SIGMOIDS, columns)


@dataclass(frozen=True)
class Tiling:
    """The constants with which the kernels compute a tile of a product."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    EVEN: bool  # D is a multiple of BLOCK_K
    TEACHER_EVEN: bool  # so is D̂
    PRECISION: str
    INTERPRETED: bool

    @classmethod
    def of(cls, tile: tuning.Tile, width: int, teacher_width: int, precision: str) -> Tiling:
        even = width % tile.block_k == 0, teacher_width % tile.block_k == 0
        return cls(*tile[:3], *even, "tf32" if precision == "tf32" else "ieee", interpreted())


def launches(call: SimilarityCall) -> list[Launch]:
    """Returns a call's launches. Matrices that one statistic needs share a launch: Z with T (relational), U, V with T (kl).

    Other matrices have launches of their own: a single matrix has registers for a tile twice as large, which reads its
    operands half as often. A launch computes T first and keeps it, and then the student's matrices one at a time, so that two
    tiles are in registers instead of four or five.
    """
    student = {
        "HAS_STUDENT": call.softmax,
        "SIGMOIDS": call.sigmoids,
        "HAS_SHARES": call.sigmoids > 0 and call.image_share is not None,
        "RELATIONAL": call.relational,  # which implies softmax
    }
    cross = {"HAS_IMAGE_TO_TEACHER": call.interactive}
    both = {"COLUMNS": call.columns, "DROP_IDS": call.drop_ids and call.ids is not None}
    if call.interactive and call.relational:
        return [Launch(**student, **cross, **both)]
    out = [Launch(**student, **both)] if call.softmax else []
    return out + ([Launch(**cross, **both)] if call.interactive else [])


@functools.cache
def block_sides(n: int, m: int, elements: int) -> tuple[int, int]:
    """Returns rows R, columns C of the blocks of an N x M matrix that backward computes in turn, R C <= elements or 128².

    For each block the gradients of its rows and of its columns are read and written once, 8 D (N ceil(M / C) + M ceil(N / R))
    bytes in all. These bytes are fewest where R and C are about equal.
    """
    found = {}
    for parts in range(1, -(-n // SIDE) + 1):
        rows = min(n, -(-n // (parts * SIDE)) * SIDE)
        columns = m if rows * m <= elements else elements // rows // SIDE * SIDE
        if columns:
            found[n * -(-m // columns) + m * -(-n // rows)] = rows, columns
    return found[min(found)] if found else (min(n, SIDE), min(m, SIDE))


def blocks_of(begin: int, end: int, m: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yields the rows, from `begin` to `end`, and the columns of each block."""
    for first, first_column in itertools.product(starts(end - begin, rows), starts(m, columns)):
        yield slice(begin + first, min(end, begin + first + rows)), slice(first_column, min(m, first_column + columns))
