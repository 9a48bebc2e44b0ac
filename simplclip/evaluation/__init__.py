"""Zero-shot evaluation: splits.py reads and encodes held-out data, metrics.py has the metrics, sheets.py draws pictures."""

from simplclip.evaluation.metrics import KS, recall, retrieval, zero_shot
from simplclip.evaluation.sheets import contact_sheet
from simplclip.evaluation.splits import Split, encode, load_splits

__all__ = ["KS", "Split", "contact_sheet", "encode", "load_splits", "recall", "retrieval", "zero_shot"]
