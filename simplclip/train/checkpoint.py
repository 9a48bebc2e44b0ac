"""The files of a run: last.pt and best.pt, written completely or not at all; what --resume accepts.

A checkpoint is one dict that torch.save wrote, see `simplclip.models.trained`. The trainer adds
    loss, optimizer, scaler     state dicts
    data                        the loader's state of each rank: what its workers have read
    rng                         states of the first rank's generators, of the CPU and every GPU;
                                others are seeded by step
    frozen                      names of frozen modules
    evaluated                   the step of the last evaluation that was finished
    best                        "recall" and "step" of the best evaluation, which best.pt has, and
                                "samples", a digest of its held-out samples; None without one
    images                      the number of images of an epoch, None if they are not counted

best.pt has the weights of the evaluation with the highest mean R@1, "recall", averaged if the run
has averages, and "samples". Evaluations of other held-out samples are not compared with it.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplclip.common import generators, ranks
from simplclip.common.files import differences, replacing, sha256, write_atomically
from simplclip.data.loader import STATE
from simplclip.models.naming import BASE, BEST, LAST
from simplclip.models.trained import FORMAT, VERSION, CheckpointError, read_checkpoint
from simplclip.models.weights import UnreadableError, checksums
from simplclip.train.config import Config, ConfigError, check_out, from_dict, resumable
from simplclip.train.setup import State

# files in the folder of a run
WRITTEN = re.compile(r"(last|best|base)\.pt|config\.yaml|metrics\.csv|evaluation\.csv|curves\.png")


def read_last(out: Path, resume: bool) -> dict[str, Any] | None:
    """Reads the checkpoint to continue from; returns None for a run that begins.

    out: folder of the run. With `resume` it is last.pt, if there is one, on the CPU. Its key "best"
    is that of best.pt, or of last.pt if that file is gone or damaged. "damage" is what is wrong
    with best.pt, or None. Without `resume` the folder must not hold a run.
    Raises ConfigError if it does, CheckpointError for files that `simplclip train` does not write
    so.
    """
    last = out / "last.pt"
    if not resume or not last.exists():
        check_out(out, resume)
        return None
    checkpoint = read_checkpoint(last)
    if not _can_continue(checkpoint):
        raise CheckpointError(
            f"{last}: expected the values that simplclip train writes, got others"
        )
    best, damage = checkpoint.get("best"), None
    if (out / BEST).exists():
        try:
            best = _read_best(out / BEST)
        except UnreadableError as error:
            damage = str(error)
    return checkpoint | {"best": best, "damage": damage}


def _read_best(file: Path) -> dict[str, Any]:
    """Returns "recall", "step" and "samples" of a best.pt; UnreadableError if it is damaged."""
    best = read_checkpoint(file)
    # a copy that the user made, which must not be replaced
    if not isinstance(best.get("recall"), float):
        raise CheckpointError(
            f"{file}: expected the best weights as simplclip train writes them, got another file"
        )
    # version 0.1.0 wrote no "samples"
    return {key: best[key] for key in ("recall", "step", "samples") if key in best}


def set_aside(out: Path, former: dict[str, Any]) -> list[str]:
    """Renames a damaged best.pt, by what `read_last` returned; returns lines for the log."""
    if former["damage"] is None:
        return []
    damaged = out / f"{BEST}.damaged"
    os.replace(out / BEST, damaged)
    line = f"warning    {former['damage']}; it is set aside as {damaged}"
    if former["best"] is not None:
        recall, step = former["best"]["recall"], former["best"]["step"]
        line += f". A new {BEST} needs a mean R@1 above its {recall:.1%}, of step {step}"
    return [line]


def _can_continue(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint has valid "rng", "data", "step" and "frozen", which a run needs."""
    try:
        torch.Generator().set_state(checkpoint["rng"]["torch"])
        positions = [position.keys() >= {*STATE} for position in checkpoint["data"]]
        best = checkpoint.get("best")
        return (
            all(positions)
            and checkpoint["step"] > 0
            and isinstance(checkpoint["frozen"], list)
            and isinstance(checkpoint.get("evaluated", 0), int)
            and (best is None or isinstance(best["recall"], float))
            and (best is None or isinstance(best["step"], int))
        )
    except (RuntimeError, LookupError, TypeError, AttributeError):
        return False


def check_settings(checkpoint: dict[str, Any], config: Config) -> None:
    """Raises ConfigError if `config` cannot continue the run of this checkpoint, see `resumable`.

    Raises CheckpointError if the checkpoint's own settings are those of another version.
    """
    last = Path(config.run.out) / "last.pt"
    try:
        old, new = from_dict(checkpoint["config"]).to_dict(), config.to_dict()
    except ConfigError as error:
        raise CheckpointError(
            f"{last}: expected settings that this version of simplclip has, got others: {error}"
        ) from None
    if _names(old["data"]["sidecars"]) == _names(new["data"]["sidecars"]):
        old["data"]["sidecars"] = new["data"]["sidecars"]  # folders that have moved
    may_change = tuple(f"{key}." for key in resumable())
    changes = [
        f"{key} was {before!r}, now {now!r}"
        for key, (before, now) in differences(old, new).items()
        if not f"{key}.".startswith(may_change)
    ]
    if changes:
        raise ConfigError(
            f"resume: expected the settings of {last}, got other settings: {'; '.join(changes)}. "
            f"{_new_run(last)}"
        )
    if checkpoint["step"] > config.run.steps:
        raise ConfigError(
            f"run.steps: expected at least {checkpoint['step']}, the step of {last}, got "
            f"{config.run.steps}"
        )


def _names(folders: list[str]) -> list[str]:
    """Returns the last parts of paths."""
    return [Path(folder).name for folder in folders]


def _new_run(last: Path) -> str:
    """Returns the sentence for the terminal which says how a new run begins with these weights."""
    return f"A new run takes its weights: --set model.checkpoint={last} --set run.out=FOLDER"


class Snapshot:
    """The state of a run after its last whole step, for a checkpoint at any time.

    It keeps copies of all that a failing step may have changed: the states of random generators and
    buffers (a forward pass changes a batch norm's statistics). Parameters and the states of
    optimizer and scaler change only in the update, while `state.updating` is set. Memory: a copy of
    the buffers, and with LoRA of what trains besides adapters.
    """

    def __init__(
        self, state: State, former: dict[str, Any] | None = None, images: int | None = None
    ) -> None:
        """Takes the present state as a whole step. former: of `read_last`; images: of an epoch."""
        self.state, self.out = state, Path(state.config.run.out)
        self.go_on = f"To go on: simplclip train {self.out / 'config.yaml'} --resume"
        former = former or {}
        saved, buffers = state.model.state_dict(), state.model.named_buffers(remove_duplicate=False)
        self._buffers = {
            name: (buffer, buffer.clone()) for name, buffer in buffers if name in saved
        }
        self.saved = state.step  # the step of last.pt; 0: there is none
        self.saved_at = time.monotonic()
        self.progress: dict[str, Any] = {
            "evaluated": former.get("evaluated", state.step),
            "images": images,
            "best": former.get("best"),
        }
        self._written = former.get("step"), former.get("evaluated")  # of last.pt
        self._base: str | None = former.get("base")  # digest of base.pt, once it is written
        # of the weights with which the run began; with LoRA, until base.pt is written, those that
        # change
        self._start: dict[str, Any] = {}
        if state.config.model.lora is None:
            self._start = former.get("start", {}) if former else checksums(saved)
        elif not former:
            kept = self._kept()
            changing = {n: w for n, w in saved.items() if n not in kept and ".lora_" not in n}
            self._start = {name: weight.cpu().clone() for name, weight in changing.items()}
        self.take()

    @property
    def best(self) -> dict[str, Any] | None:
        """ "recall", "step" and "samples" of the best evaluation so far; None without one."""
        return self.progress["best"]

    def take(self) -> None:
        """Copies buffers, step, and states of loaders and generators, after each whole step."""
        for buffer, copy in self._buffers.values():
            copy.copy_(buffer)
        self.progress |= {
            "step": self.state.step,
            "data": self.state.data,
            "rng": generators.states(),
        }

    def restore_buffers(self) -> None:
        """Overwrites the model's buffers by their values after the last whole step."""
        for buffer, copy in self._buffers.values():
            buffer.copy_(copy)

    def save(self) -> None:
        """Writes last.pt with the last whole step, and config.yaml, unless they are there.

        Parameters are written as they are: not to be called while `state.updating`.
        """
        progress = self.progress["step"], self.progress["evaluated"]
        if not ranks.first() or progress == self._written:
            return
        state = self.state
        write_atomically(self.out / "config.yaml", state.config.to_yaml())
        states = {name: item.state_dict() for name, item in state.stateful().items()}
        weights = states.pop("model") | {name: copy for name, (_, copy) in self._buffers.items()}
        settings = {"frozen": state.prepared.frozen, "config": state.config.to_dict()}
        save(self.out, self._divided(weights) | states | self.progress | settings)
        self.saved, self._written = self.progress["step"], progress
        self.saved_at = time.monotonic()

    def _kept(self) -> set[str]:
        """Returns the names of the parameters that do not train."""
        tensors = self.state.model.state_dict(keep_vars=True).items()
        return {n for n, t in tensors if isinstance(t, nn.Parameter) and not t.requires_grad}

    def _divided(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Returns what a checkpoint has of a state dict; with LoRA base.pt gets the start, once."""
        if self.state.config.model.lora is None:
            return {"model": weights, "start": self._start}
        kept = self._kept()
        if self._base is None:
            start = {name: weights[name] for name in kept} | self._start
            save(self.out, {"weights": start}, BASE)
            self._base = sha256(self.out / BASE)
        adapter = {name: weight for name, weight in weights.items() if name not in kept}
        return {"adapter": adapter, "base": self._base}

    def keep_best(self, recall: float, samples: str) -> bool:
        """Writes best.pt and config.yaml if `recall`, a mean R@1, is the highest on these samples.

        Returns on all ranks whether it is. samples: a digest. A best.pt of other samples is
        replaced.
        """
        state, best = self.state, self.best
        if best and best.get("samples", samples) == samples and recall <= best["recall"]:
            return False
        if ranks.first():
            write_atomically(self.out / "config.yaml", state.config.to_yaml())
            contents = {
                **self._divided(state.model.state_dict()),
                "step": state.step,
                "config": state.config.to_dict(),
                "recall": recall,
                "samples": samples,
                "images": self.progress["images"],
            }
            save(self.out, contents, BEST)
        self.progress["best"] = {"recall": recall, "step": state.step, "samples": samples}
        return True

    def save_after_error(self) -> str | None:
        """Writes the last whole step to last.pt after an error, unless it is there already.

        Returns a sentence: what is saved, or why not and what is intact; None without a whole step.
        """
        last, step = self.out / "last.pt", self.progress["step"]
        self.state.optimizer.zero_grad(set_to_none=True)  # saving may need the memory
        reason = f"the update of step {step + 1} was interrupted"
        try:
            if self.saved != step and not self.state.updating:
                self.save()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if self.saved == step:
            return f"Step {step} is saved in {last}." if step else None
        intact = "There is no checkpoint"
        if self.saved:
            intact = f"{last} of step {self.saved} is intact"
        return f"Step {step} is not saved: {reason}. {intact}."


def save(folder: Path, contents: dict[str, Any], name: str = LAST) -> None:
    """Writes FOLDER/NAME, with "format" and "version", completely or not at all."""
    path = folder / name
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **contents}, file)
        except RuntimeError as error:
            # After a failed write torch closes its archive, and the error of closing hides the
            # system's error.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from cause
            raise
