"""Image-text pairs in tars. loader.py makes training batches, held_out.py decodes held-out data in stored order.

Both read by tars.py what sources.py finds, join sidecars.py's files, e.g. a teacher's, and parse by samples.py.
"""

from simplclip.data.errors import EmptyDataError, ShardError, Skipped, WorkerError
from simplclip.data.held_out import HeldOut, held_out
from simplclip.data.loader import Loader, make_loader
from simplclip.data.sidecars import dataset_size, teacher_stamp
from simplclip.data.sources import expand, sources_of

__all__ = [
    "EmptyDataError",
    "HeldOut",
    "Loader",
    "ShardError",
    "Skipped",
    "WorkerError",
    "dataset_size",
    "expand",
    "held_out",
    "make_loader",
    "sources_of",
    "teacher_stamp",
]
