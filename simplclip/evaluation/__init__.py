"""Evaluation of models on held-out data: retrieval (simplclip.retrieval), zero-shot classification, tables and pictures.

encoder.py      a trained model that encodes images and texts
run.py          `simplclip evaluate`
zero_shot.py    classification
figures.py      the figures as a table
sheets.py       pictures
"""

from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.run import evaluate
from simplclip.evaluation.sheets import confusion_sheet, contact_sheet
from simplclip.evaluation.zero_shot import class_names, named, phrases, zero_shot

__all__ = [
    "Encoder", "class_names", "confusion_sheet", "contact_sheet", "evaluate", "load", "named", "phrases", "zero_shot",
]  # fmt: skip
