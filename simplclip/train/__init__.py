"""The trainer: loop.py holds a run from its config to its last checkpoint, step.py one step, state.py what is trained;
metrics.py and curves.py are what it writes, limits.py its memory, rescue.py what an error leaves, signals.py Ctrl-C."""

import importlib

__all__ = ["Interrupted", "TrainingError", "run"]

_PUBLIC = {"Interrupted": "loop", "TrainingError": "step", "run": "loop"}


def __getattr__(name: str):  # late, so that a config is read and checked before torch is imported
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"simplclip.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'simplclip.train' has no attribute {name!r}")
