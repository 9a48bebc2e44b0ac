"""Image-text pairs: shards.py reads tars, even damaged ones, epoch.py orders samples, loader.py makes batches, stream.py
reads held-out data; rewrite.py makes new shards."""

from simplclip.data.loader import EmptyEpochError, Loader, WorkerError, make_loader
from simplclip.data.shards import ShardError, expand, teacher_stamp

__all__ = [
    "EmptyEpochError",
    "Loader",
    "ShardError",
    "WorkerError",
    "expand",
    "make_loader",
    "teacher_stamp",
]
