"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and while a run trains.

encoder.py      a trained model that encodes images and texts
split.py        held-out data and its features
retrieval.py    R@k, and search for the most similar candidates
zero_shot.py    classification
figures.py      the figures as a table
sheets.py       pictures of queries and their answers
run.py          all of these for several models and splits
"""

import importlib

_MODULES = {  # imported on first use, since training needs neither pictures nor classes
    "encoder": ("Encoder", "load"),
    "retrieval": ("KS", "nearest", "recall", "recall_of"),
    "run": ("evaluate",),
    "sheets": ("contact_sheet",),
    "split": ("BATCH_SIZE", "Split", "encode", "features_of", "load_splits"),
    "zero_shot": ("class_names", "named", "phrases", "zero_shot"),
}
__all__ = [name for names in _MODULES.values() for name in names]  # noqa: PLE0605


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
