"""Features of many images or texts in a file, and search among them.

sources.py   where the images are read from
store.py     the files of features: .npz, .parquet, or clip-retrieval's folder
encode.py    writes one
search.py    searches one, by text or image, and makes a picture of what is found
"""

from simplclip.embedding.encode import embed
from simplclip.embedding.search import Hit, find, picture
from simplclip.embedding.store import Stored

__all__ = ["Hit", "Stored", "embed", "find", "picture"]
