"""Zero-shot evaluation of held-out data, with memory that does not depend on the number of images.

split.py        held-out data, and its features after `encode`
features.py     features in a file
metrics.py      retrieval
zero_shot.py    classification
sheets.py       pictures
"""

from simplclip.evaluation.features import Features
from simplclip.evaluation.metrics import KS, nearest, recall, retrieval
from simplclip.evaluation.sheets import confusion_sheet, contact_sheet
from simplclip.evaluation.split import Split, encode, features_of, load_splits
from simplclip.evaluation.zero_shot import class_names, named, phrases, zero_shot

__all__ = [
    "KS", "Features", "Split", "class_names", "confusion_sheet", "contact_sheet", "encode", "features_of", "load_splits",
    "named", "nearest", "phrases", "recall", "retrieval", "zero_shot",
]  # fmt: skip
