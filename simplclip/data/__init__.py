"""Image-text pairs: pairs.py finds them for everybody, loader.py makes batches for training in the order of epoch.py,
heldout.py decodes held-out data in theirs; sidecars.py joins further files, e.g. of a teacher; rewrite.py makes new shards
and sidecars, pack.py shards of whatever else pairs lie in."""

from simplclip.data.heldout import HeldOut, held_out
from simplclip.data.loader import EmptyEpochError, Loader, make_loader
from simplclip.data.pairs import expand, parts_of
from simplclip.data.shards import ShardError, teacher_stamp
from simplclip.data.workers import WorkerError

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
