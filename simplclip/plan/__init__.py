"""Predicts the memory and the time of a training step on a card, without the card."""
