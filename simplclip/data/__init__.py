"""Image-text pairs. pairs.py finds them for all commands. loader.py makes training batches, in the order that epoch.py draws;
heldout.py decodes held-out data in stored order. sidecars.py joins further files to samples, e.g. a teacher's. rewrite.py
makes new shards and sidecars; pack.py makes shards of tables, JSON, folders and streams."""

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
