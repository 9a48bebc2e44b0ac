"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and while a run trains.

encoder.py          a trained model that encodes images and texts
split.py            held-out data and its features
retrieval.py        R@k, and search for the most similar candidates
classification.py   zero-shot accuracies, names of classes, phrases
figures.py          the figures as a table
sheets.py           pictures of queries and their answers
run.py              all of these for several models and splits
"""

from simplclip.common.lazy import attribute

# Imported on first use, since training needs neither pictures nor classes. No function has the name of a module.
_MODULES = {
    "classification": ("class_names", "named", "phrases", "zero_shot"),
    "encoder": ("Encoder", "load"),
    "retrieval": ("KS", "nearest", "loss_of", "recall", "recall_of"),
    "run": ("evaluate",),
    "sheets": ("contact_sheet",),
    "split": ("BATCH_SIZE", "Split", "encode", "features_of", "load_splits"),
}
__all__ = [name for names in _MODULES.values() for name in names]  # noqa: PLE0605


def __getattr__(name: str):
    return attribute(__name__, _MODULES, name)
