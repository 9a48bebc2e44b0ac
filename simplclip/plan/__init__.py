"""Predicts the memory and the time of a training step on a card, without the card.

A step runs on fake tensors: every storage that an op returns is counted until it is freed, and
every kernel that it starts. step.py makes the step by functions of the trainer, fake.py runs it
without a card, count.py counts, kernels.py says what an op starts, measure.py joins these;
actual.py runs the step on real tensors, to compare. cards.py has data sheets, time.py the time of
kernels on a card. search.py searches for the largest batches; report.py prints them. compile.py
compiles the Triton kernels that such a step starts.
"""
