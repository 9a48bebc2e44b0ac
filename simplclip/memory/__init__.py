"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. pretend.py makes the fake
tensors, engine.py runs the backward pass, count.py counts, step.py has the steps (our trainer's and open_clip's), predict.py
combines these, and measure.py runs the same steps on real tensors. solve.py searches the largest batch, plan.py makes the
plan, cards.py lists the memory of cards; report.py prints a plan, and picture.py draws it.
"""

from simplclip.memory.cards import CARDS, parse_memory
from simplclip.memory.count import UncountedOp
from simplclip.memory.plan import Plan, make, micro_batch_that_fits
from simplclip.train.limits import Budget

__all__ = ["CARDS", "Budget", "Plan", "UncountedOp", "make", "micro_batch_that_fits", "parse_memory"]
