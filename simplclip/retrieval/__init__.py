"""Retrieval on held-out data, also during training. Its memory does not depend on the number of images.

split.py        held-out data, and its features after `encode`
features.py     features in a file
metrics.py      R@k, and search for the most similar candidates
"""

from simplclip.retrieval.features import Features
from simplclip.retrieval.metrics import KS, nearest, recall, recall_of
from simplclip.retrieval.split import BATCH_SIZE, Split, encode, features_of, load_splits

__all__ = ["BATCH_SIZE", "KS", "Features", "Split", "encode", "features_of", "load_splits", "nearest", "recall", "recall_of"]
