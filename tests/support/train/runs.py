"""Training runs of the tests and the files that they leave."""

import contextlib
import csv
import io
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from simplclip.models.trained import read_checkpoint
from simplclip.train import loop
from support.train import tiny

TIMED = ("samples_per_s", "data_share", "peak_mb")


def go(config, curves=False, **options) -> str:
    """Runs a config and returns the printed text. curves: draw them at the end, which takes longer
    than 7 steps.
    """
    text = io.StringIO()
    with contextlib.nullcontext() if curves else mock.patch.object(loop, "curves"):
        loop.run(config, console=Console(file=text, width=200), **options)
    return text.getvalue()


def at_step(monkeypatch, step, action):
    """Calls `action` in the middle of the training step that leads to `step`."""
    original = loop.train_step

    def stepping(state, *rest):
        if state.step + 1 == step:
            action()
        return original(state, *rest)

    monkeypatch.setattr(loop, "train_step", stepping)


def check_resumed(folder, monkeypatch, stop, changes, teacher=0) -> str:
    """Checks that a run that a signal stops after step `stop` and that is resumed equals an
    undisturbed run to the bit.

    Returns what the undisturbed run printed.
    """
    text = go(tiny.settings(folder, *changes, f"run.out={folder / 'whole'}", teacher=teacher))
    parts = tiny.settings(folder, *changes, f"run.out={folder / 'parts'}", teacher=teacher)
    with monkeypatch.context() as patch:
        at_step(patch, stop, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(loop.Interrupted, match=f"SIGINT: saved step {stop} of 7 .* --resume"):
            go(parts)
    assert read_checkpoint(folder / "parts" / "last.pt")["step"] == stop
    check_ends_as(folder / "whole", parts)
    return text


def check_ends_as(whole, config):
    """Checks that the stopped run of `config`, resumed, ends as the run in the folder `whole`."""
    torch.rand(3)  # another process would start from other random numbers
    assert "continuing from step " in go(config, resume=True)
    out = Path(config.run.out)
    assert bits(state_of(whole)) == bits(state_of(out))
    assert rows(whole) == rows(out)
    assert [row["step"] for row in rows(out)] == [str(step + 1) for step in range(config.run.steps)]


def rows(folder, file="metrics.csv"):
    with open(folder / file, newline="") as lines:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(lines)]


def state_of(folder, file="last.pt"):
    state = read_checkpoint(folder / file)
    state["config"]["run"].pop("out")
    return state


def bits(value):
    """Replaces each tensor of a state by its dtype and bytes, so that == compares states to the
    bit.
    """
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return (
        (value.dtype, value.contiguous().view(-1).numpy().tobytes())
        if isinstance(value, torch.Tensor)
        else value
    )
