"""Predicted times on cards: beside step times that others measured, and of this library's calls.

No GPU is needed.
"""
