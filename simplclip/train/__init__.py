"""The trainer: `run(config)` trains a config to its last checkpoint.

sections.py     the sections of a config, with every key
config.py       a config: read, changed by --set, described
setup.py        model, weights, optimizer: the state of a run
pairs.py        the training pairs, packed and counted before the run begins
objective.py    the loss, with weights by step
step.py         one step: forward, loss, backward, update
prefix.py       the frozen beginning of a tower, which runs once in a step
compilation.py  compiled towers, after the first steps
loop.py         the steps of a run
evaluate.py     the evaluations of a run
signals.py      signals that end a run after a whole step
checkpoint.py   last.pt, what --resume accepts
distributed.py  several ranks
nodes.py        what all nodes must have alike
log.py          lines, metrics.csv, evaluation.csv
curves.py       curves.png, and held-out losses that rise
"""

import typing as _typing

from simplclip.common.lazy import attribute as _attribute

if _typing.TYPE_CHECKING:
    from simplclip.train.loop import Interrupted, TrainingError, run

__all__ = ["Interrupted", "TrainingError", "run"]

if not _typing.TYPE_CHECKING:  # a type checker would take any name for known
    # imported late, so that a config is checked before torch is imported
    def __getattr__(name: str) -> _typing.Any:
        return _attribute(__name__, {"loop": tuple(__all__)}, name)
