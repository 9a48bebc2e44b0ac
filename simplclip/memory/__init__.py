"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py makes the step by the
functions of the trainer, fake.py runs it without a card, count.py counts, measure.py puts these together, or measures a step
on real tensors. plan.py searches for the largest batches; report.py prints them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simplclip.memory.plan import Budget, Planner, largest_micro_batch, parse_memory

__all__ = ["Budget", "Planner", "largest_micro_batch", "parse_memory"]


def __getattr__(name: str):  # imported on first use: code that runs ops on fake tensors needs no trainer
    if name in __all__:
        return getattr(importlib.import_module("simplclip.memory.plan"), name)
    raise AttributeError(f"module 'simplclip.memory' has no attribute {name!r}")
