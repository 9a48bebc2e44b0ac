"""The trainer: `run(config)` trains a config to its last checkpoint.

sections.py     the sections of a config, with every key
config.py       a config: read, changed by --set, described
resolve.py      what a config leaves open: shards, steps, a micro-batch that fits
setup.py        model and weights: the state of a run
start.py        the weights with which a run began
optimizer.py    AdamW, the learning rate, averages of the weights
objective.py    the loss, with weights by step
step.py         one step: forward, loss, backward, update
beginning.py    the frozen beginning of a tower, which runs once in a step
loop.py         the steps of a run
evaluate.py     the evaluations of a run
signals.py      signals that end a run after a whole step
checkpoint.py   last.pt, what --resume accepts
distributed.py  several ranks
log.py          lines, metrics.csv, evaluation.csv
curves.py       curves.png, and held-out losses that rise
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
