"""Checkpoints: written completely or not at all, and read without running code from the file.

A checkpoint is one `torch.save` dict that loads with weights_only=True:
    format, version         "simplclip", 1
    model, loss, optimizer, schedule, scaler       state dicts; also ema, if the run averages its weights
    step, epoch, batch      optimizer steps done; current epoch; batches used in that epoch
    data                    the loader's state in that epoch
    rng                     states of torch (CPU and every GPU), Python's random and numpy
    config, frozen, ranks   the resolved config as a plain dict; names of frozen modules; number of ranks
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simplclip.common.files import replacing
from simplclip.models.trained import FORMAT, VERSION, CheckpointError
from simplclip.models.trained import read_checkpoint as load

__all__ = ["WRITTEN", "CheckpointError", "load", "rng_state", "save", "set_rng_state", "step_of"]

WRITTEN = re.compile(r"last\.pt|config\.yaml|metrics\.csv|evaluation\.csv|curves\.png")  # files in the folder of a run


def save(folder: str | Path, state: dict[str, Any]) -> Path:
    """Writes FOLDER/last.pt and returns its path.

    A crash, a full disk or a signal at any moment leaves the old last.pt unchanged or the new one complete.
    """
    last = Path(folder) / "last.pt"
    with replacing(last) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:
            # After a failed write torch closes its archive, and the error of closing hides the system's error.
            if isinstance(first := error.__context__, OSError):
                raise OSError(first.errno, first.strerror, str(last)) from first
            raise
    return last


def step_of(path: str | Path) -> int | None:
    """Reads the step of a checkpoint, but not its tensors; returns None if the file is missing or cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # the type depends on the damage
        return None


def rng_state() -> dict[str, Any]:
    """Returns the states of all random generators that training uses, as tensors and plain types."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (transforms may draw from the global generator)
    state["numpy"] = [str(name), torch.from_numpy(np.asarray(keys).astype("int64")), *map(float, rest)]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the states that `rng_state` returned. The states of GPUs are skipped if the number of GPUs differs."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), int(position), int(has_gauss), cached))  # noqa: NPY002
