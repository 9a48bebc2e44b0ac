"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and
while a run trains.

encoder.py          a trained model that encodes images and texts
split.py            held-out data as a model reads them, and its towers
index.py            encoded held-out data: R@k, loss, pictures
results.py          the results and evaluation.json
retrieval.py        search for the most similar candidates, R@k
classification.py   zero-shot accuracies, names of classes, phrases
figures.py          the results as a table
sheets.py           pictures of queries and their answers
run.py              all of these for several models and splits
"""

import typing as _typing

from simplclip.common.lazy import attribute as _attribute

if _typing.TYPE_CHECKING:
    from simplclip.evaluation.classification import class_names, named, phrases, zero_shot
    from simplclip.evaluation.encoder import Encoder, load
    from simplclip.evaluation.index import BATCH_SIZE, Index, encode
    from simplclip.evaluation.results import (
        Classification,
        Figure,
        ModelResult,
        Results,
        Retrieval,
        SplitResult,
    )
    from simplclip.evaluation.retrieval import KS, nearest, recall
    from simplclip.evaluation.run import Settings, evaluate
    from simplclip.evaluation.sheets import contact_sheet
    from simplclip.evaluation.split import LEAST_SAMPLES, Split, Towers, load_splits

# Imported on first use, since training needs neither pictures nor classes. No function has the name
# of a module.
_MODULES = {
    "classification": ("class_names", "named", "phrases", "zero_shot"),
    "encoder": ("Encoder", "load"),
    "index": ("BATCH_SIZE", "Index", "encode"),
    "results": (
        "Classification",
        "Figure",
        "ModelResult",
        "Results",
        "Retrieval",
        "SplitResult",
    ),
    "retrieval": ("KS", "nearest", "recall"),
    "run": ("Settings", "evaluate"),
    "sheets": ("contact_sheet",),
    "split": ("LEAST_SAMPLES", "Split", "Towers", "load_splits"),
}
__all__ = [
    "BATCH_SIZE",
    "Classification",
    "Encoder",
    "Figure",
    "Index",
    "KS",
    "LEAST_SAMPLES",
    "ModelResult",
    "Results",
    "Retrieval",
    "Settings",
    "Split",
    "SplitResult",
    "Towers",
    "class_names",
    "contact_sheet",
    "encode",
    "evaluate",
    "load",
    "load_splits",
    "named",
    "nearest",
    "phrases",
    "recall",
    "zero_shot",
]

if not _typing.TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> _typing.Any:
        return _attribute(__name__, _MODULES, name)
