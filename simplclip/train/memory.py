"""How much memory a run may take, and what is said when that was not enough."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from simplclip.cards import CONTEXT_BYTES, Budget, gib
from simplclip.config import Config

try:
    import resource
except ImportError:  # Windows
    resource = None


class MemoryLimit:
    """What a run on `device` may take: the card's or the machine's memory, or `limit` bytes of it, which cap the process.

    On a GPU torch's allocator is capped at the limit less the driver's context, so that a larger card stands for one of that
    size. On a CPU the process's data segment is (Linux); a failed allocation raises there instead of swapping.

    Errors: ValueError for a limit above what is there, or below what the process has already.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device, self._former = device, None
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
            self.budget = Budget(self._checked(limit, total, CONTEXT_BYTES))
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction((limit - CONTEXT_BYTES) / total, device)
            return
        taken = _data_bytes()
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
        self.budget = Budget(self._checked(limit, total, taken), context=taken, libraries=0)
        if limit is not None:
            if resource is None or not Path("/proc/self/status").exists():
                raise ValueError("--memory-limit: expected a GPU or Linux, this system cannot cap a process")
            self._former = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, self._former[1]))

    def lift(self) -> None:
        """Ends a CPU's cap; what comes after the run needs memory too."""
        if self._former:
            resource.setrlimit(resource.RLIMIT_DATA, self._former)
            self._former = None

    @staticmethod
    def _checked(limit: int | None, total: int, taken: int) -> int:
        if limit is not None and not taken < limit <= total:
            raise ValueError(
                f"--memory-limit: expected more than the {taken / 2**20:,.0f} MiB that are taken already and at most the "
                f"{total / 2**20:,.0f} MiB that are there, came {limit / 2**20:,.0f} MiB"
            )
        return limit or total

    def settle(self, config: Config) -> Config:
        """`config` with a number of data.micro_batch in the place of "auto". Errors: ConfigError."""
        from simplclip import plan  # which imports the trainer

        return plan.micro_batch_that_fits(config, self.budget, device=self.device.type)

    def advice(self, config: Config) -> str:
        """What `simplclip plan` says of a step that did not fit."""
        from simplclip import plan

        made = plan.make(config, self.budget, device=self.device.type, solve=False)
        told = [
            f"The plan: this step takes {gib(made.usage.peak)}, usable are {gib(self.budget.usable)} of "
            f"{gib(self.budget.memory)}."
        ]
        told += [f"Try {advice}." for advice in made.advice]
        try:
            micro = self.settle(config).data.micro_batch
        except ValueError as error:  # nothing fits, or the model's norms forbid micro-batches
            told.append(str(error))
        else:
            told += [f"data.micro_batch={micro} fits."] if micro and micro != config.data.micro_batch else []
        return " ".join(told)


def ran_out(error: Exception) -> bool:
    """Whether an allocator's refusal is what was raised; that of a CPU's tensors has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't allocate memory" in str(
        error
    )


def _data_bytes() -> int:
    """This process's data segment so far, as RLIMIT_DATA counts it; 0 where it is not told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmData")), 0)
