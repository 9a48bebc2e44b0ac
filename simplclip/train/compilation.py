"""Compilation of a run's towers after its first steps, if config.run.compile is "auto"."""

from __future__ import annotations

import time
from collections.abc import Callable

from simplclip.common import generators, ranks
from simplclip.train.checkpoint import Snapshot
from simplclip.train.log import Log
from simplclip.train.setup import State, compile_towers, compiled_modules
from simplclip.train.step import TrainingError

EAGER_STEPS = 10  # before the decision
WORTH_SECONDS = 600.0  # of the run, for which compilation of minutes pays


def may_compile(state: State) -> bool:
    """Whether run.compile=auto may compile the towers of a run: on a GPU, with one rank.

    Several ranks would have to agree; on a CPU compilation changes results, and gains little.
    """
    return state.device.type == "cuda" and ranks.count() == 1


class Compilation:
    """Runs a run's steps, and decides once whether the rest of them run compiled.

    They do after EAGER_STEPS, on a GPU with one rank, if they would take longer than WORTH_SECONDS
    and compilation works. The decision replaces "auto" in the state's config, for a resumed run.
    """

    def __init__(self, state: State, snapshot: Snapshot, log: Log) -> None:
        """Compiles nothing yet; the snapshot gives buffers back if a compiled step fails."""
        self.state = state
        self.snapshot = snapshot
        self.log = log
        self.undecided = state.config.run.compile == "auto" and may_compile(state)
        self.steps = 0  # that have run
        self.began = 0.0  # the time after the first step, which chose and compiled kernels

    def step(self, train: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Calls `train`, which runs one step, and returns its figures.

        If compilation fails, `train` is called again, from the same buffers and generators.
        """
        if self.undecided and self.steps == 1:
            self.began = time.monotonic()
        if self.undecided and self.steps == EAGER_STEPS:
            self.undecided = False
            steps = self.state.config.run.steps or 0
            left = steps - self.state.step
            seconds = left * (time.monotonic() - self.began) / (EAGER_STEPS - 1)
            worth = seconds > WORTH_SECONDS
            self._decide(worth)
            if worth:
                return self._first_compiled(train)
        self.steps += 1
        return train()

    def _decide(self, compiled: bool) -> None:
        """Sets run.compile in the state's config, in place of "auto"."""
        self.state.config = self.state.config.replaced(run={"compile": compiled})

    def _first_compiled(self, train: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Compiles the towers and returns a step; undoes that for good if a compiler fails."""
        state = self.state
        crop = state.prepared.crop
        states = generators.states()
        sizes = (crop.multiple, crop.groups) if crop else (0, 0)
        self.log.print("compile    the towers, by torch.compile: the next steps take longer")
        compile_towers(state.prepared)
        try:
            return train()
        except Exception as error:  # of any type, from compilers
            if isinstance(error, TrainingError) or state.updating:
                raise
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        self.log.print(f"warning    compilation failed, the towers run as before: {reason}")
        for module in compiled_modules(state.prepared):
            module._compiled_call_impl = None
        if crop:
            crop.multiple, crop.groups = sizes
        generators.restore(states)
        self.snapshot.restore_buffers()
        self._decide(False)
        return train()
