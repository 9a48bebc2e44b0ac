"""Evaluation of models on held-out data, each figure with its chance; `simplclip evaluate`, and
while a run trains.

encoder.py          a trained model that encodes images and texts
index.py            encoded held-out data: search, R@k, loss, pictures
classification.py   zero-shot accuracies, names of classes, phrases
results.py          the results, evaluation.json and the table
sheets.py           pictures of queries and their answers
run.py              all of these for several models and splits, and for blends of a run's weights
                    with those of its start
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
