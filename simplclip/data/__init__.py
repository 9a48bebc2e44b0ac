"""Image-text pairs in tars. loader.py makes training batches, held_out_data.py decodes held-out
data in stored order.

Both read by tars.py what sources.py finds, join sidecars.py's files, e.g. a teacher's, and parse by
samples.py.
"""

from typing import TYPE_CHECKING, Any

from simplclip.common.lazy import attribute

if TYPE_CHECKING:
    from simplclip.data.errors import EmptyDataError, ShardError, Skipped, WorkerError
    from simplclip.data.held_out_data import Division, HeldOut, divided, held_out
    from simplclip.data.loader import Loader
    from simplclip.data.pack import packed
    from simplclip.data.sidecars import dataset_size, teacher_stamp
    from simplclip.data.sources import sources_of

_MODULES = {  # imported on first use: packing needs no torch
    "errors": ("EmptyDataError", "ShardError", "Skipped", "WorkerError"),
    "held_out_data": ("Division", "HeldOut", "divided", "held_out"),
    "loader": ("Loader",),
    "pack": ("packed",),  # simplclip.data.pack is the module
    "sidecars": ("dataset_size", "teacher_stamp"),
    "sources": ("sources_of",),
}
__all__ = [
    "Division",
    "EmptyDataError",
    "HeldOut",
    "Loader",
    "ShardError",
    "Skipped",
    "WorkerError",
]
__all__ += ["dataset_size", "divided", "held_out", "packed", "sources_of", "teacher_stamp"]

if not TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> Any:
        return attribute(__name__, _MODULES, name)
