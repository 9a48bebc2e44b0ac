"""Training runs of the tests and the files that they leave."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import nn

from simplclip import models
from simplclip.models.trained import read_checkpoint
from simplclip.train import checkpoint, log, loop
from simplclip.train.config import Config, from_dict
from support.models.weights import randomise

TIMED = ("samples_per_s", "data_share", "peak_mb")


def go(config: Config, curves: bool = False, **options: Any) -> str:
    """Runs a config and returns the printed text. curves: draw them, which takes long."""
    text = io.StringIO()
    drawing = contextlib.nullcontext() if curves else mock.patch.object(log, "write_curves")
    with drawing:
        loop.run(config, console=Console(file=text, width=200), **options)
    return text.getvalue()


def save_run(folder: Path, name: str, **options: Any) -> nn.Module:
    """Saves `models.create(name, **options)` with random weights as a run; returns the model."""
    model = randomise(models.create(name, **options))
    values = {
        "model": {"name": name, "options": options},
        "data": {"train": "x.tar"},
        "run": {"out": str(folder)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "step": 7, "config": from_dict(values).model_dump()}
    checkpoint.save(folder, state)
    return model


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Calls `action` in the middle of the training step that leads to `step`."""
    train_step = loop.train_step

    def interrupted_step(state: Any, *rest: Any) -> Any:
        if state.step + 1 == step:
            action()
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", interrupted_step)


def check_ends_as(whole: Path, config: Config) -> None:
    """Checks that the stopped run of `config`, resumed, ends as the run in the folder `whole`."""
    torch.rand(3)  # another process would start from other random numbers
    assert "continuing from step " in go(config, resume=True)
    out = Path(config.run.out)
    assert bits(state_of(whole)) == bits(state_of(out))
    assert rows(whole) == rows(out)
    assert [row["step"] for row in rows(out)] == [str(step + 1) for step in range(config.run.steps)]


def rows(folder: Path, file: str = "metrics.csv") -> list[dict[str, str]]:
    """Returns the rows of a table without what depends on the machine."""
    table = log.read_figures(folder / file)
    for row in table:
        for name in TIMED:
            row.pop(name, None)
    return table


def state_of(folder: Path, file: str = "last.pt") -> dict:
    """Returns a checkpoint without the folder of its run."""
    state = read_checkpoint(folder / file)
    state["config"]["run"].pop("out")
    return state


def bits(value: Any) -> Any:
    """Replaces each tensor of a state by dtype and bytes: == then compares to the bit."""
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.contiguous().view(-1).numpy().tobytes()
    return value
