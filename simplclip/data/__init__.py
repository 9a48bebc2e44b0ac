"""Image-text pairs, from the tars that a user names to batches.

find       find_sources.py: the tars; find_sidecars.py: further files of their samples
read       read_tars.py: samples of tars; readers.py: rows of other forms, each by its read_*.py;
           read_meta.py: meta.json beside tars
parse      samples.py: the image, captions, json and a teacher's features of a sample;
           captions.py: what some captions are like
decode     decode_images.py: image files, by Pillow
transform  transforms.py: the pixels that a model takes; views.py: those of one sample
batch      loader.py: for training, by divide_samples.py and cut_blocks.py; held_out_loader.py: for
           evaluation, by stored_order.py; both in the processes of workers.py
write      pack.py: tars of other forms; write_sidecars.py; both by write_tars.py
"""

import typing as _typing

from simplclip.common.lazy import attribute as _attribute

if _typing.TYPE_CHECKING:
    from simplclip.data.errors import EmptyDataError, ShardError, Skipped, WorkerError
    from simplclip.data.find_sources import sources_of
    from simplclip.data.held_out_loader import Division, HeldOut, count_division, held_out
    from simplclip.data.loader import Loader
    from simplclip.data.pack import pack_shards
    from simplclip.data.read_meta import dataset_size, teacher_stamp
    from simplclip.data.read_tars import some_captions

_MODULES = {  # imported on first use: packing needs no torch
    "errors": ("EmptyDataError", "ShardError", "Skipped", "WorkerError"),
    "held_out_loader": ("Division", "HeldOut", "count_division", "held_out"),
    "loader": ("Loader",),
    "pack": ("pack_shards",),  # simplclip.data.pack is the module
    "read_meta": ("dataset_size", "teacher_stamp"),
    "read_tars": ("some_captions",),
    "find_sources": ("sources_of",),
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
__all__ += ["count_division", "dataset_size", "held_out"]
__all__ += ["pack_shards", "some_captions", "sources_of", "teacher_stamp"]

if not _typing.TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> _typing.Any:
        return _attribute(__name__, _MODULES, name)
