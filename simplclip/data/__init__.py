"""Image-text pairs: shards.py reads tars, even damaged ones, epoch.py orders samples, loader.py makes batches; rewrite.py
makes new shards of them."""

from simplclip.data.loader import EmptyEpochError, EvalSet, Loader, WorkerError, load_eval, make_loader
from simplclip.data.shards import ShardError, expand, teacher_stamp

__all__ = [
    "EmptyEpochError",
    "EvalSet",
    "Loader",
    "ShardError",
    "WorkerError",
    "expand",
    "load_eval",
    "make_loader",
    "teacher_stamp",
]
