"""What fits on a card, before buying the hour: the memory of a training step, predicted without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is gone: pretend.py makes the tensors
and the card, engine.py is the backward pass, count.py counts, step.py has the steps (our trainer's and open_clip's),
predict.py puts them together, and measure.py runs the same steps on real tensors. solve.py looks for the largest batch;
plan.py says what is asked, ../cards.py what a card has; report.py says it to a person.
"""

from simplclip.cards import CARDS, Budget, parse_memory
from simplclip.plan.count import UncountedOp
from simplclip.plan.plan import Plan, make, micro_batch_that_fits

__all__ = ["CARDS", "Budget", "Plan", "UncountedOp", "make", "micro_batch_that_fits", "parse_memory"]
