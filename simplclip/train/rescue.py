"""What is saved when a run fails: its last whole step, to the bit, and what is said about it."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from simplclip.common.files import write_atomically
from simplclip.data.workers import undisturbed
from simplclip.train import checkpoint
from simplclip.train.state import Training


class LastStep:
    """Where `this` stood after its last whole step.

    What a step that fails may have changed by then is kept apart: states of random generators, the place in the data, and the
    buffers of modules in training mode (a batch norm's statistics, which the forward pass changes). Parameters and the states
    of optimizer, schedule and scaler change in the update alone, which `this.updating` tells.

    Memory: those buffers once more.
    """

    def __init__(self, this: Training, out: Path):
        self.this, self.out, self.last = this, out, out / "last.pt"
        self._claimed = False
        self._changing = {
            f"{path}.{name}" if path else name: buffer
            for path, module in this.model.named_modules(remove_duplicate=False)
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        self._buffers = {name: buffer.clone() for name, buffer in self._changing.items()}
        self._note_place()

    def take(self) -> None:
        """Call after each whole step. The first of a run claims its folder, by config.yaml."""
        for held, live in zip(_by_dtype(self._buffers), _by_dtype(self._changing)):
            torch._foreach_copy_(held, live)
        self._note_place()
        self._claim()

    def save(self, prune: bool = True) -> None:
        """Write the checkpoint of the last whole step."""
        self._claim()
        state = self.this.state() | self._place
        state["model"].update(self._buffers)
        checkpoint.save(self.out, state, self.this.config.run.keep, prune)

    def rescue(self, free: bool = False) -> str | None:
        """Save the last whole step if that is not done, and say so; or why not, and which checkpoint is good.

        free: let go of gradients first. None where there was no whole step, in this run nor in one that it goes on from.
        """
        this, step = self.this, self._place["step"]
        with undisturbed(tell=False):
            if free:
                this.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                if this.device.type == "cuda":
                    torch.cuda.empty_cache()
            good = checkpoint.step_of(self.last)
            if good == step:
                return f"Step {step} is saved in {self.last}."
            if this.updating:
                reason = (
                    f"The update of step {this.step + 1} was broken off, so that the weights are those of no whole step: "
                    "they are not saved."
                )
            elif this.step == 0:
                return None
            else:
                try:
                    if this.step != step:  # it failed, or was stopped, right behind the update
                        self.take()
                    self.save(prune=False)
                    return f"Saved step {this.step} in {self.last}."
                except Exception as error:
                    good = checkpoint.step_of(self.last)
                    if good == this.step:
                        return f"Saved step {good} in {self.last}, but: {error}."
                    reason = f"Step {this.step} could not be saved: {type(error).__name__}: {error}."
        if good is None:
            return f"{reason} There is no checkpoint."
        return f"{reason} The last checkpoint, {self.last} of step {good}, is intact."

    def _note_place(self) -> None:
        this = self.this
        self._place = {"step": this.step, "epoch": this.epoch, "batch": this.batch, "rng": checkpoint.rng_state()}

    def _claim(self) -> None:
        if not self._claimed:
            write_atomically(self.out / "config.yaml", self.this.config.to_yaml())
            self._claimed = True


def _by_dtype(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    """Copied together in one kernel each."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
