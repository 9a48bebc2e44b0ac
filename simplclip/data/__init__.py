"""Image-text pairs: sources.py finds them, shards.py reads tars, even damaged ones, and tables.py the others, epoch.py orders
samples, loader.py makes batches, stream.py reads held-out data; sidecars.py joins further files, e.g. of a teacher and the
views (views.py) that it saw; rewrite.py makes new shards and sidecars."""

from simplclip.data.loader import EmptyEpochError, Loader, make_loader
from simplclip.data.shards import ShardError, expand, teacher_stamp
from simplclip.data.sources import parts_of
from simplclip.data.workers import WorkerError

__all__ = [
    "EmptyEpochError",
    "Loader",
    "ShardError",
    "WorkerError",
    "expand",
    "make_loader",
    "parts_of",
    "teacher_stamp",
]
