"""Teachers: models whose features are computed once and written into sidecars, so that training never loads one.

`simplclip.load` loads a teacher. features.py is `simplclip teacher`, which writes features of an image or of augmented views
of the image, by one teacher or several. caption.py is `simplclip caption`.
"""

from simplclip.evaluation.encoder import load
from simplclip.teacher.features import Ensemble, Views, evaluate, run, student_transform, write

__all__ = ["Ensemble", "Views", "evaluate", "load", "run", "student_transform", "write"]
