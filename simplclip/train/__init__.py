"""The trainer: `run(config)` trains a config to its last checkpoint.

sections.py     the sections of a config, with every key
config.py       a config: read, changed by --set, described
resolve.py      what a config leaves open: shards, steps, a micro-batch that fits
setup.py        model and weights: the state of a run, and that with which it began
optimizer.py    AdamW, the learning rates, averages of the weights
objective.py    the loss, with weights by step, and averages of gradients over ranks
step.py         one step: forward, loss, backward, update
beginning.py    the frozen beginning of a tower, which runs once in a step
loop.py         the steps of a run
evaluate.py     the evaluations of a run, and signals that end it after a whole step
checkpoint.py   last.pt, what --resume accepts
log.py          lines, metrics.csv, evaluation.csv, curves.png
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
