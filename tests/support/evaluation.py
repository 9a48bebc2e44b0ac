"""Indices of held-out data with features that a test chooses."""

import torch

from simplclip.data.errors import Skipped
from simplclip.data.held_out_loader import HeldOutRow
from simplclip.evaluation.index import Index, candidates_of


def blank(image):
    return torch.zeros(3, 2, 2)


def batches_of(data, transform=blank, batch_size=10, workers=0):
    """Returns the batches of held-out data that have images, and all that was skipped."""
    batches, skipped = [], Skipped()
    for batch in data.batches(transform, batch_size, workers):
        skipped.merge(batch.skipped)
        assert len(batch.images) == len(batch.rows)
        if batch.rows:
            batches.append(batch)
    return batches, skipped


def index_of(data, image_features=None, text_features=None):
    """Returns the index of `data`, which are read."""
    batches, skipped = batches_of(data)
    rows = [row for batch in batches for row in batch.rows]
    return Index(data, rows, *candidates_of(rows), image_features, text_features, skipped)


def index_of_features(image_features, text_features):
    """Returns the index of n images, of which the first m have a caption."""
    captions = [[f"text {row}"] for row in range(len(text_features))]
    captions += [[]] * (len(image_features) - len(captions))
    rows = [HeldOutRow(row, str(row), texts, None, None, row) for row, texts in enumerate(captions)]
    return Index(None, rows, *candidates_of(rows), image_features, text_features, Skipped())
