"""Blocks of samples that loader processes prepared, cut to batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch

from simplclip.data.errors import Skipped

Batch = dict[str, Any]


class Place(NamedTuple):
    """Where a sample stands among those that its loader process reads."""

    epoch: int
    consumed: int  # samples of the epoch up to this one, broken ones included


class Block(NamedTuple):
    """Samples that a loader process prepared, as a batch."""

    batch: Batch  # {} without a usable sample
    places: list[Place]  # of the samples in the batch
    worker: int
    epoch: int  # of the last sample that was tried
    skipped: Skipped | None  # since the worker's last block; None without any


def whole_batches(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """Yields the samples of `blocks`, which have at most `size`, in blocks of `size`.

    A whole block is yielded itself, without a copy, until one is short.
    """
    rest: list[Block] = []  # less than a batch
    for block in blocks:
        if not rest and len(block.places) == size:
            yield block
            continue
        missing = size - sum(len(part.places) for part in rest)
        rest.append(block)
        if len(block.places) < missing:
            continue
        rest[-1] = _rows(block, slice(missing))
        yield _joined(rest)
        rest = [_rows(block, slice(missing, None))] if len(block.places) > missing else []


def _rows(block: Block, rows: slice) -> Block:
    """Returns some of a block's samples, without a copy of the tensors."""
    batch = {name: value[rows] for name, value in block.batch.items()}
    return block._replace(batch=batch, places=block.places[rows])


def _joined(blocks: list[Block]) -> Block:
    """Returns the samples of several blocks in one, which is the last one in all else."""
    blocks = [block for block in blocks if block.places]
    batches = [block.batch for block in blocks]
    batch = {name: _concatenated([part[name] for part in batches]) for name in batches[0]}
    return blocks[-1]._replace(batch=batch, places=[*chain(*(block.places for block in blocks))])


def _concatenated(values: list[Any]) -> Any:
    """Returns a value of several batches as that of one, a tensor (pinned as before) or a list."""
    if not isinstance(values[0], torch.Tensor):
        return [*chain(*values)]
    joined = torch.cat(values)
    return joined.pin_memory() if values[0].is_pinned() else joined
