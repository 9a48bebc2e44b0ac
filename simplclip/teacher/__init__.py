"""Teachers: models whose features are computed once and written into shards, so that training never loads one.

teachers.py loads one by name; builtin.py is the one that needs no download, and heads.py trains what aligns its two frozen
networks; features.py writes features over shards and measures a teacher's retrieval.
"""

from simplclip.teacher.features import evaluate, write
from simplclip.teacher.heads import train as train_heads
from simplclip.teacher.teachers import Teacher, load

__all__ = ["Teacher", "evaluate", "load", "train_heads", "write"]
