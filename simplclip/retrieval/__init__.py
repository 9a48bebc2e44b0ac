"""Retrieval of held-out data, with memory that does not depend on the number of images; training does it on the way.

split.py        held-out data, and its features after `encode`
features.py     features in a file
metrics.py      R@k, and the nearest of many
"""

from simplclip.retrieval.features import Features
from simplclip.retrieval.metrics import KS, nearest, recall, recall_of
from simplclip.retrieval.split import BATCH_SIZE, Split, encode, features_of, load_splits

__all__ = ["BATCH_SIZE", "KS", "Features", "Split", "encode", "features_of", "load_splits", "nearest", "recall", "recall_of"]
