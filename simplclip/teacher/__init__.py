"""Teachers: models whose features are computed once and written into shards, so that training never loads one.

teachers.py loads one by name; features.py is `simplclip teacher`, which writes features and measures retrieval.
"""

from simplclip.teacher.features import evaluate, run, write
from simplclip.teacher.teachers import Teacher, load

__all__ = ["Teacher", "evaluate", "load", "run", "write"]
