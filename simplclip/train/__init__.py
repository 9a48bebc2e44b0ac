"""The trainer: loop.py is a run from its config to its last checkpoint, step.py one step, state.py what is trained;
folder.py locks and checks the run's folder, metrics.py and curves.py write its figures, limits.py limits its memory,
rescue.py handles Ctrl-C and saves after an error."""

import importlib

__all__ = ["Interrupted", "TrainingError", "run"]

_PUBLIC = {"Interrupted": "loop", "TrainingError": "step", "run": "loop"}


def __getattr__(name: str):  # imported late, so that a config is checked before torch is imported
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"simplclip.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'simplclip.train' has no attribute {name!r}")
