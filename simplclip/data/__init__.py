"""Image-text pairs, from the tars that a user names to batches.

pack.py       a table, JSON file or folder (rows.py) becomes tars
shards.py     tars by path, pattern, URL or command; their samples; meta.json beside them
sidecars.py   further files of the samples, joined by key, and what writes them
samples.py    the image, captions, json and a teacher's features of a sample
images.py     image files, by Pillow; transforms.py: the pixels that a model takes
loader.py     batches for training; held_out_loader.py: those of evaluation; both by workers.py
errors.py     counts of what is damaged
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
