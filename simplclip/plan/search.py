"""Searches the largest batches and micro-batches that fit."""

from __future__ import annotations

from bisect import bisect_right

from simplclip.plan.cards import GIB
from simplclip.plan.step import Row, Step
from simplclip.train.config import ConfigError

MOST_PAIRS = 1 << 16  # of a largest batch; CLIP was trained with 32,768
# What is assumed to be taken of a device's memory: by the driver and torch's libraries, by cuBLAS
# and cuDNN; and the share of the rest that the allocator loses.
CONTEXT, LIBRARIES, FRAGMENTATION = 640 << 20, 160 << 20, 0.04


def usable(memory: int) -> int:
    """Returns the bytes that the tensors of a step may take of a device's memory."""
    return int((memory - CONTEXT - LIBRARIES) * (1 - FRAGMENTATION))


def largest(step: Step, memory: int, micro: int | None = None) -> Row | None:
    """Predicts the largest batch of at most MOST_PAIRS that fits; None if none does.

    micro: pairs at a time, of which the batch is a multiple; None: one graph.
    """
    unit = micro or 1
    sizes = range(unit, MOST_PAIRS + 1, unit)
    fit = bisect_right(sizes, usable(memory), key=lambda size: step.row(size, micro, memory).peak)
    return step.row(sizes[fit - 1], micro, memory) if fit else None


def fitting(step: Step, size: int, memory: int) -> Row:
    """Predicts the step of a batch in one graph or, if it does not fit, by gradient caching.

    The micro-batch is the largest divisor of `size` that fits. Raises ConfigError if none fits,
    InputError if the model does not allow gradient caching, which the batch needs.
    """
    limit = usable(memory)
    divisors = [n for n in range(size - 1, 0, -1) if size % n == 0]
    for micro in (None, *divisors):
        row = step.row(size, micro, memory)
        if row.peak <= limit:
            return row
    raise ConfigError(
        f"data.batch_size: expected one that fits {limit / GIB:.2f} GiB one pair at a time, got "
        f"{size:,}"
    )
