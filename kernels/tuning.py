"""Tiles of the kernels that multiply matrices, by op and precision, without autotuning.

`make aot` compiles every kernel with its tile and prints registers, shared memory and occupancy;
none may spill.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Blocks, warps and pipeline stages of a kernel that multiplies matrices, [m, k] by [k, n]."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    # at least so many programs share a multiprocessor; forward divides the columns accordingly
    blocks: int = 1
    # of a thread at most; without a limit ptxas spills a few where more programs fit then
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Returns a launch's arguments BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages by name."""
        return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), self[:5]))


PRECISIONS = ("half", "tf32", "ieee")


def dot_precision(precision: str) -> str:
    """Returns tl.dot's input_precision, "tf32" or "ieee", for "half", "tf32" or "ieee"."""
    return "tf32" if precision == "tf32" else "ieee"


# Several programs of the similarity kernels share a multiprocessor: the statistics of one run
# beside the products of others.
_TILES = {
    ("similarity", "half"): Tile(64, 64, 32, 4, 4, 2, registers=248),
    # its L2 cache is slow beside its tensor cores; three stages spill
    ("similarity", "half", 90): Tile(128, 64, 64, 8, 2),
    ("similarity", "tf32"): Tile(64, 64, 16, 4, 4, 2, registers=248),
    ("similarity", "tf32", 90): Tile(64, 64, 16, 8, 3),  # four warps spill
    ("similarity", "ieee"): Tile(64, 64, 16, 8, 3, registers=248),
    ("parallel_mlp", "half"): Tile(128, 128, 32, 8, 3),
    ("parallel_mlp", "tf32"): Tile(128, 128, 16, 8, 3),
    ("parallel_mlp", "ieee"): Tile(64, 64, 16, 8, 3),
}


def lookup(op: str, precision: str, architecture: int) -> Tile:
    """Returns the tile of an op on a GPU: its architecture's own, or else that of all.

    op: "similarity" or "parallel_mlp". precision: "half", "tf32" or "ieee". architecture: e.g. 90.
    Raises KeyError for others.
    """
    return _TILES.get((op, precision, architecture)) or _TILES[op, precision]
