"""Whether the programs of a launch write each element of its results once: at sizes that no memory
holds, from what a few programs store.

A program writes a block of a result. The first program's block gives the blocks' size. As many
programs must have been started as there are blocks. Each program that ran must have written a whole
block, of which no two are the same, and the last one the block at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.capture import Started
from ptx.huge import address
from support.kernels.recorder import Stand

Regions = dict[str, tuple[Stand, Tensor]]  # a tensor, and a view of it on the device "meta"


def region(stand: Stand, *index: Any) -> tuple[Stand, Tensor]:
    whole = torch.empty_strided(stand.shape, stand.strides, dtype=stand.dtype, device="meta")
    return stand, whole[index]


def statistics(a: dict[str, Any], programs: int) -> Regions:
    parts = ("row_parts", "column_parts")
    return {name: region(a[name], slice(None), 0) for name in parts if a[name] is not None}


def merge(a: dict[str, Any], programs: int) -> Regions:
    first = a["out_first"]
    return {"statistic 0": region(a["out"], 0, slice(first, first + a["size"]))}


def diagonal(a: dict[str, Any], programs: int) -> Regions:
    return {"positives": region(a["rows"], a["stat"])}


def gradient(a: dict[str, Any], programs: int) -> Regions:
    tile = a["TILE"]
    rows = slice(min(a["n"] - a["first_row"], a["row_blocks"] * tile.BLOCK_M))
    # also what lies between the matrix's last column and the pitch is written
    columns = slice(min(a["out_stride"], a["column_blocks"] * tile.BLOCK_N))
    return {"G": region(a["out"], rows, columns), "sums": region(a["sums"], slice(programs), 0)}


def activate(a: dict[str, Any], programs: int) -> Regions:
    stand, view = region(a["activated"])
    return {"activated": (stand, view.flatten())}


def heads(*names: str) -> Callable[[dict[str, Any], int], Regions]:
    return lambda a, programs: {name: region(a[name].first) for name in names}


REGIONS: dict[str, Callable[[dict[str, Any], int], Regions]] = {
    "_similarity_statistics_kernel": statistics,
    "_similarity_merge_kernel": merge,
    "_similarity_diagonal_kernel": diagonal,
    "_similarity_gradient_kernel": gradient,
    "_similarity_sigmoid_kernel": gradient,
    "_similarity_range_kernel": lambda a, programs: {"out": region(a["out"])},
    "_parallel_mlp_activate_kernel": activate,
    "_parallel_mlp_hidden_kernel": lambda a, programs: {"h": region(a["h"])},
    "_shaped_attention_terms_kernel": heads("out"),
    "_shaped_attention_gradients_kernel": heads("dq", "dk", "dv"),
}


def check(started: Started) -> None:
    launch = started.launch
    for name, (stand, view) in REGIONS[started.name](started.arguments, launch.programs).items():
        check_blocks(f"{started.name}: {name}", launch, stand, view)


def check_blocks(subject: str, launch: Any, stand: Stand, view: Tensor) -> None:
    blocks = _blocks(launch, stand, view)
    sizes = [size for _, size in _dimensions(view)]
    last = [size - 1 for size in sizes]
    low, high = blocks.get(0, (last, last))
    assert not any(low), f"{subject}: the first program does not write the first element"
    block = [end + 1 for end in high]
    count = math.prod(-(-size // side) for size, side in zip(sizes, block))
    expected = f"expected {count} programs for blocks {block} of {sizes}"
    assert launch.programs == count, f"{subject}: {expected}, got {launch.programs}"
    assert launch.programs - 1 in blocks, f"{subject}: the last program writes nothing"
    assert blocks[launch.programs - 1][1] == last, f"{subject}: the end is not written"
    for program, (low, high) in blocks.items():
        ends = [min(begin + side, size) - 1 for begin, side, size in zip(low, block, sizes)]
        whole = high == ends and not any(begin % side for begin, side in zip(low, block))
        assert whole, f"{subject}: program {program} writes {low} to {high}, no block of {block}"
    distinct = {tuple(low) for low, _ in blocks.values()}
    assert len(distinct) == len(blocks), f"{subject}: two programs write a block"


def _dimensions(view: Tensor) -> list[tuple[int, int]]:
    """Returns (stride in bytes, size) of dimensions with several elements, by falling stride."""
    dimensions = [(step * view.itemsize, size) for step, size in zip(view.stride(), view.shape)]
    return sorted([each for each in dimensions if each[1] > 1], reverse=True)


def _blocks(launch: Any, stand: Stand, view: Tensor) -> dict[int, tuple[list[int], list[int]]]:
    """Returns the lowest and the highest indices of a view that each program has stored to."""
    begin = address(stand) + view.storage_offset() * view.itemsize
    found: dict[int, list[np.ndarray]] = {}
    for programs, at, size in launch.memory.stores:
        for place in (at, at + size - view.itemsize):
            rest = place - begin
            inside = rest >= 0
            indices = []
            for step, count in _dimensions(view):
                index, rest = np.divmod(rest, step)
                inside &= index < count
                indices.append(index)
            inside &= rest < view.itemsize
            for program in np.unique(programs[inside]):
                chosen = np.stack(indices or [rest])[:, inside & (programs == program)]
                found.setdefault(int(program), []).append(chosen)
    blocks = {}
    for program, chosen in found.items():
        every = np.concatenate(chosen, 1)
        blocks[program] = every.min(1).tolist(), every.max(1).tolist()
    return blocks
