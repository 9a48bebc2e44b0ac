"""Teachers: models whose features are computed once and written into shards, so that training never loads one.

teachers.py loads one by name; features.py writes features over shards and measures a teacher's retrieval; command.py is
`simplclip teacher`.
"""

from simplclip.teacher.features import evaluate, write
from simplclip.teacher.teachers import Teacher, load

__all__ = ["Teacher", "evaluate", "load", "write"]
