"""The files of a run: last.pt and best.pt, written completely or not at all.

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

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplclip.common import generators, ranks
from simplclip.common.files import differences, replacing, sha256, write_atomically
from simplclip.models.naming import BASE, BEST, LAST
from simplclip.models.trained import FORMAT, VERSION, CheckpointError, read_checkpoint
from simplclip.models.weights import checksums
from simplclip.train.config import Config, ConfigError, check_out
from simplclip.train.setup import State

# files in the folder of a run
WRITTEN = re.compile(r"(last|best|base)\.pt|config\.yaml|metrics\.csv|evaluation\.csv|curves\.png")
# what only the start of a run reads; other settings that do not fit are refused by their shapes
FIXED = ("model.name", "inherit.train", "inherit.blocks", "optim.name")


def read_last(out: Path, resume: bool) -> dict[str, Any] | None:
    """Reads last.pt in the folder `out`, to continue from; returns None for a run that begins.

    Without `resume` the folder must not hold a run: ConfigError. Raises CheckpointError for a file
    that `simplclip train` does not write so.
    """
    last = out / LAST
    if not resume or not last.exists():
        check_out(out, resume)
        return None
    checkpoint = read_checkpoint(last)
    if missing := {"optimizer", "data", "rng", "frozen", "step"} - checkpoint.keys():
        raise CheckpointError(
            f"{last}: expected a checkpoint to continue from, got one without {min(missing)}"
        )
    return checkpoint


def changed_settings(checkpoint: dict[str, Any], config: Config) -> Iterator[str]:
    """Yields a line for each setting in which `config` differs from that of the checkpoint.

    Raises ConfigError for one that a run cannot change, or fewer steps than are done.
    """
    last = Path(config.run.out) / LAST
    if checkpoint["step"] > (config.run.steps or 0):
        raise ConfigError(
            f"run.steps: expected at least {checkpoint['step']}, the step of {last}, got "
            f"{config.run.steps}"
        )
    for key, (old, new) in differences(checkpoint["config"], config.to_dict()).items():
        if key.startswith(FIXED):
            raise ConfigError(
                f"{key}: expected {old!r}, with which the run began, got {new!r}. A new run takes "
                f"its weights: --set model.checkpoint={last} --set run.out=FOLDER"
            )
        yield f"resume     {key} was {old!r}, now {new!r}"


class Snapshot:
    """The files of a run, and its progress after the last whole step.

    Parameters and the states of optimizer and scaler change only in the update, while
    `state.updating` is set; the state of the generators is kept after each step.
    """

    def __init__(
        self, state: State, former: dict[str, Any] | None = None, images: int | None = None
    ) -> None:
        """Takes the present state as a whole step. former: of `read_last`; images: of an epoch."""
        self.state, self.out = state, Path(state.config.run.out)
        self.go_on = f"To go on: simplclip train {self.out / 'config.yaml'} --resume"
        former = former or {}
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
        saved = state.model.state_dict()
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
        """Notes the step, and states of loaders and generators, after each whole step."""
        self.progress |= {
            "step": self.state.step,
            "data": self.state.data,
            "rng": generators.states(),
        }

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
        weights = states.pop("model")
        settings = {"frozen": state.prepared.frozen, "config": state.config.to_dict()}
        save(self.out, self._divided(weights) | states | self.progress | settings)
        self.saved, self._written = self.progress["step"], progress
        self.saved_at = time.monotonic()

    def save_after_error(self) -> str:
        """Writes the last whole step to last.pt if it can; returns a sentence on the first
        rank, "" without a step.

        The running statistics of batch norms are those of the step that failed.
        """
        step, last = self.progress["step"], self.out / LAST
        if not step or not ranks.first():
            return ""
        reason = f"the update of step {step + 1} was interrupted"
        if not self.state.updating:
            self.state.optimizer.zero_grad(set_to_none=True)  # saving may need the memory
            try:
                self.save()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        if self.saved == step:
            return f"Step {step} is saved in {last}."
        intact = f"{last} of step {self.saved} is intact" if self.saved else "No step is saved"
        return f"Step {step} is not saved: {reason}. {intact}."

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
        if best and best["samples"] == samples and recall <= best["recall"]:
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
