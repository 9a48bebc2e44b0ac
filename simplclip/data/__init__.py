"""Image-text pairs, from the tars that a user names to batches.

find       find_sources.py: the tars; find_sidecars.py: further files of their samples
read       read_tars.py: samples of tars; readers.py: rows of other forms, each by its read_*.py;
           read_meta.py: meta.json beside tars
parse      samples.py: the image, captions, json and a teacher's features of a sample
decode     decode_images.py: image files, by Pillow
transform  transforms.py: the pixels that a model takes; views.py: those of one sample
batch      loader.py: for training, by divide_samples.py and cut_blocks.py; held_out_loader.py: for
           evaluation, by stored_order.py; both in the processes of workers.py
write      pack.py: tars of other forms; write_sidecars.py; both by write_tars.py
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
