"""Image-text pairs in tars. loader.py makes training batches, held_out_data.py decodes held-out data in stored order.

Both read by tars.py what sources.py finds, join sidecars.py's files, e.g. a teacher's, and parse by samples.py.
"""

from simplclip.common.lazy import attribute

_MODULES = {  # imported on first use: packing needs no torch
    "errors": ("EmptyDataError", "ShardError", "Skipped", "WorkerError"),
    "held_out_data": ("Division", "HeldOut", "divided", "held_out"),
    "loader": ("Loader",),
    "pack": ("packed",),  # simplclip.data.pack is the module
    "sidecars": ("dataset_size", "teacher_stamp"),
    "sources": ("sources_of",),
}
__all__ = [name for names in _MODULES.values() for name in names]  # noqa: PLE0605


def __getattr__(name: str):
    return attribute(__name__, _MODULES, name)
