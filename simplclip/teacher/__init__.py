"""Teachers: models whose features are computed once and written into shards, so that training never loads one.

`simplclip.encoder` loads one; features.py is `simplclip teacher`, which writes features and measures retrieval.
"""

from simplclip.encoder import load
from simplclip.teacher.features import evaluate, run, write

__all__ = ["evaluate", "load", "run", "write"]
