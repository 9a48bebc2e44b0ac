"""Checkpoints: written whole or not at all, read without running code from the file.

A checkpoint is one `torch.save` dict that loads with weights_only=True:
    format, version         "simplclip", 1
    model, loss, optimizer, schedule, scaler       state dicts
    step, epoch, batch      optimizer steps done; epoch running; batches of that epoch already used
    rng                     states of torch (CPU and every GPU), Python's random and numpy
    config                  the resolved config as a plain dict
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from simplclip.common.errors import InputError
from simplclip.common.files import Replacing, sync_folder

FORMAT, VERSION = "simplclip", 1
_NUMBERED = re.compile(r"step-(\d+)\.pt")
_TEMPORARY = re.compile(r"\.(last\.pt|step-\d+\.pt|config\.yaml|metrics\.csv|evaluation\.csv|curves\.png)\.tmp")


class CheckpointError(InputError):
    """A file that is no usable checkpoint."""


def save(folder: str | Path, state: dict[str, Any], keep: int, prune: bool = True) -> Path:
    """Write FOLDER/last.pt and FOLDER/step-NNNNNN.pt; leave the `keep` newest numbered ones. Returns last.pt.

    A crash, a full disk or a signal at any moment leaves the former last.pt as it was, or the new one whole. Without `prune`
    all numbered ones are left.
    """
    folder = Path(folder)
    last = folder / "last.pt"
    _write(last, state)
    if keep:
        _alias(last, folder / f"step-{state['step']:06d}.pt")
    for old in numbered_checkpoints(folder)[: -keep or None] if prune else ():
        old.unlink()
    return last


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Errors: FileNotFoundError, CheckpointError."""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors here, by the kind of damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no simplclip checkpoint: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no simplclip checkpoint: it lacks the mark format={FORMAT!r}")
    if state["version"] > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer simplclip (checkpoint version {state['version']}, known up to {VERSION})"
        )
    return state


def step_of(path: str | Path) -> int | None:
    """The step of a checkpoint, whose tensors are not read; None where there is no file, or one that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # torch raises by the kind of damage
        return None


def remove_temporaries(folder: str | Path) -> None:
    """Remove what a killed training left of files that it was writing in FOLDER. Other files are left alone."""
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """step-NNNNNN.pt in FOLDER, oldest first."""
    found = [(int(m[1]), p) for p in Path(folder).iterdir() if (m := _NUMBERED.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def rng_state() -> dict[str, Any]:
    """States of all random number generators that training can draw from, as tensors and plain types."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [str(name), torch.from_numpy(keys.astype("int64")), *map(float, rest)]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned. GPU states are skipped where the number of GPUs differs."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), int(position), int(has_gauss), cached))


def _write(path: Path, state: dict[str, Any]) -> None:
    with Replacing(path) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:
            # After a write that failed torch ends its archive, and the error of that hides the system's.
            if isinstance(first := error.__context__, OSError):
                raise OSError(first.errno, first.strerror, str(path)) from first
            raise


def _alias(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, atomically."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)
