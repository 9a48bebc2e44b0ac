"""Tile sizes by op, planes in registers, dtype and architecture: a plain table, no autotuning.

`python -m benchmarks.aot` compiles every entry and prints registers, shared memory and occupancy; none may spill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    blocks: int  # that share a multiprocessor, at least: the launcher divides the columns for them

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


ARCHITECTURES = (80, 86, 89, 90, 120)
PRECISIONS = ("half", "tf32", "ieee")
INTERPRETER = 0  # in place of an architecture: small, so that small tests have several tiles, and all sides differ

_INTERPRETED = Tile(32, 64, 16, 4, 2, 1)
_TABLE: dict[tuple[str, int, str], Tile] = {
    ("similarity_forward", 1, "half"): Tile(128, 128, 32, 8, 4, 1),
    ("similarity_forward", 2, "half"): Tile(128, 64, 32, 8, 4, 1),
    ("similarity_forward", 3, "half"): Tile(128, 64, 32, 8, 4, 1),
    ("similarity_forward", 4, "half"): Tile(64, 64, 32, 8, 4, 1),
    ("similarity_forward", 5, "half"): Tile(64, 64, 32, 8, 4, 1),
}
_TABLE |= {("similarity_backward", *rest): tile for (_, *rest), tile in _TABLE.items()}


def lookup(op: str, planes: int, precision: str, architecture: int) -> Tile:
    return _INTERPRETED if architecture == INTERPRETER else _TABLE[op, planes, precision]


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"
