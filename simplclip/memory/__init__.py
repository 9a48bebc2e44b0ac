"""What fits on a card, before buying the hour: the memory of a training step, predicted without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is gone: pretend.py makes the tensors
and the card, engine.py is the backward pass, count.py counts, step.py has the steps (our trainer's and open_clip's),
predict.py puts them together, and measure.py runs the same steps on real tensors. solve.py looks for the largest batch;
plan.py says what is asked, cards.py what a card has; report.py says it to a person, picture.py draws it.
"""

from simplclip.memory.cards import CARDS, parse_memory
from simplclip.memory.count import UncountedOp
from simplclip.memory.plan import Plan, make, micro_batch_that_fits
from simplclip.train.limits import Budget

__all__ = ["CARDS", "Budget", "Plan", "UncountedOp", "make", "micro_batch_that_fits", "parse_memory"]
