"""Teachers: models whose features are computed once and written into sidecars, so that training never loads one.

`simplclip.load` loads one; features.py is `simplclip teacher`, which writes features, of an image or of augmented views of
it; ensemble.py makes one teacher of several.
"""

from simplclip.evaluation.encoder import load
from simplclip.teacher.ensemble import Ensemble
from simplclip.teacher.features import Views, run, student_transform, write

__all__ = ["Ensemble", "Views", "load", "run", "student_transform", "write"]
