"""The trainer: loop.py holds a run from its config to its last checkpoint, step.py one step, state.py what is trained;
metrics.py and curves.py are what it writes, limits.py its memory, rescue.py what an error leaves, signals.py Ctrl-C."""

from simplclip.train.loop import Interrupted, run
from simplclip.train.step import TrainingError

__all__ = ["Interrupted", "TrainingError", "run"]
