"""Image-text pairs: sources.py finds them, shards.py reads tars, even damaged ones, and tables.py the others, epoch.py orders
samples, loader.py makes batches, stream.py reads held-out data; sidecars.py joins further files, e.g. of a teacher and the
views (views.py) that it saw; rewrite.py makes new shards and sidecars."""

from simplclip.data.heldout import HeldOut, held_out
from simplclip.data.loader import EmptyEpochError, Loader, WorkerError, make_loader
from simplclip.data.pairs import expand, parts_of
from simplclip.data.shards import ShardError, teacher_stamp

__all__ = [
    "EmptyEpochError",
    "HeldOut",
    "Loader",
    "ShardError",
    "WorkerError",
    "expand",
    "held_out",
    "make_loader",
    "parts_of",
    "teacher_stamp",
]
