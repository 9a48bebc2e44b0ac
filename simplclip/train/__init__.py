"""The trainer: loop.py is a run from its config to its last checkpoint, step.py one step, state.py what is trained;
folder.py locks and checks the run's folder, metrics.py writes its figures, limits.py limits its memory, rescue.py handles
Ctrl-C and saves after an error."""

import importlib

__all__ = ["Interrupted", "TrainingError", "run"]


def __getattr__(name: str):  # imported late, so that a config is checked before torch is imported
    if name in __all__:
        return getattr(importlib.import_module("simplclip.train.loop"), name)
    raise AttributeError(f"module 'simplclip.train' has no attribute {name!r}")
