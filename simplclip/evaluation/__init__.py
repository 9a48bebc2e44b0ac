"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and while a run trains.

encoder.py          a trained model that encodes images and texts
split.py            held-out data and its features
retrieval.py        R@k, and search for the most similar candidates
classification.py   zero-shot accuracies, names of classes, phrases
figures.py          the figures as a table
sheets.py           pictures of queries and their answers
run.py              all of these for several models and splits
"""

import importlib

# Imported on first use, since training needs neither pictures nor classes. No function has the name of a module.
_MODULES = {
    "classification": ("class_names", "named", "phrases", "zero_shot"),
    "encoder": ("Encoder", "load"),
    "retrieval": ("KS", "nearest", "recall", "recall_of"),
    "run": ("evaluate",),
    "sheets": ("contact_sheet",),
    "split": ("BATCH_SIZE", "Split", "encode", "features_of", "load_splits"),
}
__all__ = [name for names in _MODULES.values() for name in names]  # noqa: PLE0605


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
