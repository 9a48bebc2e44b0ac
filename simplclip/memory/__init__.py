"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py has the steps (our
trainer's and open_clip's), fake.py runs them without a card, count.py counts. measure.py predicts a step by these, or runs it
on real tensors; plan.py makes the plan, and report.py prints and draws it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simplclip.common.cards import CARDS
    from simplclip.memory.count import UncountedOp
    from simplclip.memory.plan import Plan, make, micro_batch_that_fits, parse_memory
    from simplclip.train.limits import Budget

__all__ = ["CARDS", "Budget", "Plan", "UncountedOp", "make", "micro_batch_that_fits", "parse_memory"]

# Imported on first use: who runs ops on fake tensors needs no trainer.
_MODULES = {"CARDS": "common.cards", "UncountedOp": "memory.count", "Budget": "train.limits"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'simplclip.memory' has no attribute {name!r}")
    return getattr(importlib.import_module(f"simplclip.{_MODULES.get(name, 'memory.plan')}"), name)
