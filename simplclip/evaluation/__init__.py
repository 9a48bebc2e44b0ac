"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and
while a run trains.

encoder.py          a trained model that encodes images and texts
split.py            held-out data as a model reads them, and its towers
index.py            encoded held-out data: R@k, loss, pictures
results.py          the results and evaluation.json
retrieval.py        search for the most similar candidates, R@k
classification.py   zero-shot accuracies, names of classes, phrases
figures.py          the results as a table
sheets.py           pictures of queries and their answers
run.py              all of these for several models and splits
blending.py         blends of a run's weights with those of its start
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
