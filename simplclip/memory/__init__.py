"""Predicts the memory of a training step on a card, without the card.

A step runs on fake tensors, and every storage that an op returns is counted until it is freed. step.py makes the step by
functions of the trainer, fake.py runs it without a card, count.py counts, measure.py joins these. plan.py searches for the
largest batches; report.py prints them.
"""
