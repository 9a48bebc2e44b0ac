"""Predicted times on cards: beside step times that others measured, and of this library's calls. No GPU is needed."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: launches are recorded as on a card
