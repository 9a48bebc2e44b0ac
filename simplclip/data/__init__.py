"""Image-text pairs: sources.py finds them, shards.py reads tars, even damaged ones, and tables.py the others, epoch.py orders
samples, loader.py makes batches; rewrite.py makes new shards of them."""

from simplclip.data.loader import EmptyEpochError, EvalSet, Loader, WorkerError, load_eval, make_loader
from simplclip.data.shards import ShardError, expand, teacher_stamp
from simplclip.data.sources import parts_of

__all__ = [
    "EmptyEpochError",
    "EvalSet",
    "Loader",
    "ShardError",
    "WorkerError",
    "expand",
    "load_eval",
    "make_loader",
    "parts_of",
    "teacher_stamp",
]
