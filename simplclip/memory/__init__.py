"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py defines the steps of
our trainer and of open_clip's, fake.py runs them without a card, and count.py counts. measure.py predicts a step's memory by
these modules, or measures it on real tensors. plan.py makes the plan; report.py prints and draws it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simplclip.memory.plan import Budget, Plan, make, micro_batch_that_fits, parse_memory

__all__ = ["Budget", "Plan", "make", "micro_batch_that_fits", "parse_memory"]


def __getattr__(name: str):  # imported on first use: code that runs ops on fake tensors needs no trainer
    if name in __all__:
        return getattr(importlib.import_module("simplclip.memory.plan"), name)
    raise AttributeError(f"module 'simplclip.memory' has no attribute {name!r}")
