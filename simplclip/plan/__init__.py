"""Predicts the memory and the time of a training step on a card, without the card.

meter.py counts live bytes and work of a pass on fake tensors, step.py runs the trainer's functions
under it and finds the largest batches. cards.py has data sheets, and the time of work on a card.
"""
