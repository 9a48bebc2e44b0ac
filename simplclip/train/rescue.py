"""Early ends of a run: a signal stops it between two steps, and after an error the last whole step is saved, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip.common import ranks
from simplclip.common.files import write_atomically
from simplclip.data.workers import undisturbed
from simplclip.train import checkpoint
from simplclip.train.state import Training


class StopRequest:
    """Context in which a signal of `SIGNALS`, or a closed pipe, only sets `requested`; a second signal ends the process.

    console: the console of the run. If the reader of its output is gone (`| head`), all further output is dropped.
    Outside the main thread Python allows no handlers, so that signals are not handled.
    """

    LATE = 15  # seconds that the ranks have to agree; torchrun kills a rank 30 seconds after its signal
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested: str | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        self.console.on_broken_pipe = self._closed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_) -> None:
        if ranks.count() > 1:
            signal.alarm(0)
        del self.console.on_broken_pipe
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Returns the reason why all ranks stop now, between two steps; None if they go on."""
        stopped = ranks.any_reason(self.requested)
        if stopped:
            self.requested = stopped
            if ranks.count() > 1:
                signal.alarm(0)
        return stopped

    def _late(self, number: int, frame) -> None:
        raise RuntimeError(f"{self.requested}: the ranks did not finish a step in {self.LATE} seconds: timeout")

    def _handle(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            # Ctrl-C and a closed terminal reach forked loader processes too. The last step needs these; SIGTERM ends them.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested and ranks.count() == 1:
            raise KeyboardInterrupt
        if not self.requested and ranks.count() > 1:
            signal.signal(signal.SIGALRM, self._late)
            signal.alarm(self.LATE)
        self.requested = signal.Signals(number).name
        # Not print(): a handler may interrupt a print, and Python's buffered files are not reentrant.
        at_once = "" if ranks.count() > 1 else "; a second signal stops at once"  # torchrun repeats the signals it gets
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self.requested}: finishing this step, then saving{at_once}\n".encode() * ranks.first())

    def _closed(self) -> None:
        """Drops all further output. rich calls this instead of raising BrokenPipeError."""
        self.requested = self.requested or "closed pipe"
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.console.file.fileno())
        os.close(nowhere)


class LastStep:
    """The state of `training` after its last whole step.

    It keeps copies of all state that a failing step may have changed: states of random generators, the position in the data,
    and buffers (a forward pass changes a batch norm's statistics). Parameters and the states of optimizer, schedule and
    scaler change only in the update, during which `training.updating` is set. Memory: a copy of the buffers.
    """

    def __init__(self, training: Training):
        self.training, self.out = training, Path(training.config.run.out)
        self.last = self.out / "last.pt"
        self._claimed = not ranks.first()
        saved, buffers = training.model.state_dict(), training.model.named_buffers(remove_duplicate=False)
        self._changing = {name: buffer for name, buffer in buffers if name in saved}
        self._buffers = {name: buffer.clone() for name, buffer in self._changing.items()}
        self._progress = training.progress()

    def take(self) -> None:
        """Copies the state after a whole step; to be called after each. After the first step, writes config.yaml."""
        for dtype in {buffer.dtype for buffer in self._buffers.values()}:  # one kernel each
            names = [name for name, buffer in self._buffers.items() if buffer.dtype == dtype]
            torch._foreach_copy_([self._buffers[name] for name in names], [self._changing[name] for name in names])
        self._progress = self.training.progress()
        self._claim()

    def save(self) -> None:
        """Writes the checkpoint of the last whole step, on the first rank."""
        if not ranks.first():
            return
        self._claim()
        state = self.training.state() | self._progress
        state["model"].update(self._buffers)
        checkpoint.save(self.out, state)

    def rescue(self) -> str | None:
        """Saves the last whole step if it is not saved. Returns a sentence: what is saved, or why not and what is intact.

        Returns None if there was no whole step, in this run or in one that it continues. Frees the gradients.
        """
        training, step = self.training, self._progress["step"]
        with undisturbed(report=False):
            training.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            good = checkpoint.step_of(self.last)
            if good == step:
                return f"Step {step} is saved in {self.last}."
            if training.updating:
                reason = (
                    f"The update of step {training.step + 1} was interrupted, so that the weights are not those of a whole "
                    "step and are not saved."
                )
            elif training.step == 0:
                return None
            else:
                try:
                    if training.step != step:  # the error came right after the update
                        self.take()
                    self.save()
                    return f"Saved step {training.step} in {self.last}."
                except Exception as error:
                    reason = f"Step {training.step} could not be saved: {type(error).__name__}: {error}."
        if good is None:
            return f"{reason} There is no checkpoint."
        return f"{reason} The last checkpoint, {self.last} of step {good}, is intact."

    def _claim(self) -> None:
        if not self._claimed:
            write_atomically(self.out / "config.yaml", self.training.config.to_yaml())
            self._claimed = True
