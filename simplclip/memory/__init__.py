"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py makes the step by the
functions of the trainer, fake.py runs it without a card, count.py counts, measure.py puts these together, or measures a step
on real tensors. plan.py searches for the largest batches; report.py prints them.
"""

from simplclip.common.lazy import attribute

_MODULES = {"plan": ("Budget", "Planner", "largest_micro_batch", "parse_memory")}
__all__ = [*_MODULES["plan"]]  # noqa: PLE0604


def __getattr__(name: str):  # imported on first use: code that runs ops on fake tensors needs no trainer
    return attribute(__name__, _MODULES, name)
