"""The trainer. loop.py runs a config to its last checkpoint, step.py runs one step, and state.py has the model, loss and
optimizer. folder.py locks and checks the run's folder, metrics.py writes the run's figures, limits.py limits its memory, and
rescue.py handles Ctrl-C and saves after an error."""

import importlib

__all__ = ["Interrupted", "TrainingError", "run"]


def __getattr__(name: str):  # imported late, so that a config is checked before torch is imported
    if name in __all__:
        return getattr(importlib.import_module("simplclip.train.loop"), name)
    raise AttributeError(f"module 'simplclip.train' has no attribute {name!r}")
