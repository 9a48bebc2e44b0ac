"""Training runs of the tests and what they leave behind."""

import csv
import io

import torch
from rich.console import Console

from simplclip.train import checkpoint
from simplclip.train import loop as train

TIMED = ("samples_per_s", "peak_mb")


def go(config, **options) -> str:
    """Runs and returns what was printed."""
    text = io.StringIO()
    train.run(config, console=Console(file=text, width=200), **options)
    return text.getvalue()


def at_step(monkeypatch, step, action):
    """Calls `action` in the middle of the training step that leads to `step`."""
    original = train.train_step

    def stepping(this, batches):
        if this.step + 1 == step:
            action()
        return original(this, batches)

    monkeypatch.setattr(train, "train_step", stepping)


def rows(folder, file="metrics.csv"):
    with open(folder / file, newline="") as lines:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(lines)]


def assert_same(a, b, path=""):
    """Equal to the bit, through all containers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def state_of(folder):
    state = checkpoint.load(folder)
    state["config"]["run"].pop("out")
    return state


def bits(value):
    """A state with each tensor as its dtype and bytes, so that == compares it to the bit."""
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return (value.dtype, value.contiguous().view(-1).numpy().tobytes()) if isinstance(value, torch.Tensor) else value
