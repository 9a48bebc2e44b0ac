"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py has the steps (our
trainer's and open_clip's), fake.py runs them without a card, count.py counts. measure.py predicts a step by these, or runs it
on real tensors; plan.py makes the plan, and report.py prints and draws it.
"""

from simplclip.memory.count import UncountedOp
from simplclip.memory.plan import CARDS, Plan, make, micro_batch_that_fits, parse_memory
from simplclip.train.limits import Budget

__all__ = ["CARDS", "Budget", "Plan", "UncountedOp", "make", "micro_batch_that_fits", "parse_memory"]
