"""Zero-shot evaluation: metrics.py reads and encodes held-out data and has the metrics, sheets.py draws pictures."""

from simplclip.evaluation.metrics import KS, Split, encode, load_splits, recall, retrieval, zero_shot
from simplclip.evaluation.sheets import contact_sheet

__all__ = ["KS", "Split", "contact_sheet", "encode", "load_splits", "recall", "retrieval", "zero_shot"]
