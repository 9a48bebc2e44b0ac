"""Writers of sidecars, which training joins to the samples of shards.

features.py   `simplclip teacher`: a teacher's features of captions and of images, or of augmented
              views of images
caption.py    `simplclip caption`: captions drawn by a model of transformers
"""

from simplclip.teacher.features import Views, run, student_transform, write_features

__all__ = ["Views", "run", "student_transform", "write_features"]
