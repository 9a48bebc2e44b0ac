"""The trainer: loop.py holds a run from its config to its last checkpoint; metrics.py what it writes; signals.py Ctrl-C."""

from simplclip.train.loop import Interrupted, TrainingError, run

__all__ = ["Interrupted", "TrainingError", "run"]
