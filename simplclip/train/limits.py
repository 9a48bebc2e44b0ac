"""Limits of a run's memory, and the message when it runs out."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.train.config import ConfigError
from simplclip.train.settings import Config

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """The bytes of a card or a machine, and how many a step may use. The defaults are assumptions, not measured."""

    memory: int
    context: int = 640 << 20  # of the driver, with the modules of torch and cuBLAS
    libraries: int = 160 << 20  # workspaces of cuBLAS and cuDNN
    fragmentation: float = 0.04  # the share of the rest that the allocator loses

    @property
    def usable(self) -> int:
        return int((self.memory - self.context - self.libraries) * (1 - self.fragmentation))


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


class MemoryLimit:
    """The memory that a run on `device` may use: all of the card or the machine, or `limit` bytes, which cap the process.

    On a GPU torch's allocator is capped at the limit minus the driver's context, so that a larger card behaves like a card of
    `limit` bytes. On a CPU (Linux) the process's data segment is capped; an allocation then fails instead of swapping.

    Raises InputError for a limit above the available memory, or below the memory that the process already uses.
    """

    def __init__(self, device: torch.device, limit: int | None = None, planner: ModuleType | None = None) -> None:
        self.device, self.planner, self.ranks, self._former = device, planner, ranks.count(), None
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
            self.budget = Budget(self._checked(limit, total, Budget.context))
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction((limit - Budget.context) / total, device)
            return
        taken = hardware.process_bytes("VmData")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
        self.budget = Budget(self._checked(limit, total, taken), context=taken, libraries=0)
        if limit is not None:
            if resource is None or not Path("/proc/self/status").exists():
                raise InputError("--memory-limit: expected a GPU or Linux, got a system that cannot cap a process")
            self._former = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, self._former[1]))

    def lift(self) -> None:
        """Removes the cap on a CPU, where the process may need more memory after the run."""
        if self._former:
            resource.setrlimit(resource.RLIMIT_DATA, self._former)
            self._former = None

    @staticmethod
    def _checked(limit: int | None, total: int, taken: int) -> int:
        if limit is not None and not taken < limit <= total:
            raise InputError(
                f"--memory-limit: expected more than the {taken / 2**20:,.0f} MiB in use and at most the available "
                f"{total / 2**20:,.0f} MiB, got {limit / 2**20:,.0f} MiB"
            )
        return limit or total

    def with_micro_batch(self, config: Config) -> Config:
        """Returns `config` with data.micro_batch "auto" replaced by a number. Raises ConfigError."""
        if self.planner is None:
            raise ConfigError(
                "data.micro_batch: expected a number without a planner, got auto; pass planner=simplclip.memory"
            )
        with ranks.alone():
            return self.planner.micro_batch_that_fits(config, self.budget, device=self.device.type, ranks=self.ranks)

    def advice(self, config: Config) -> str:
        """Returns the planner's advice for a step that did not fit, as sentences."""
        if self.planner is None:
            return "Without a planner there is no advice."
        with ranks.alone():
            made = self.planner.make(config, self.budget, device=self.device.type, solve=False, ranks=self.ranks)
        peak, usable, memory = gib(made.usage.peak), gib(made.usable), gib(made.memory)
        parts = [f"The plan: this step takes {peak}; {usable} are usable of {memory}."]
        parts += [f"Try {advice}." for advice in made.advice]
        try:
            micro = self.with_micro_batch(config).data.micro_batch
            parts += [f"data.micro_batch={micro} fits."] if micro and micro != config.data.micro_batch else []
        except ValueError as error:  # nothing fits, or the model's norms forbid micro-batches
            parts.append(str(error))
        return " ".join(parts)


def ran_out(error: Exception) -> bool:
    """Whether the error says that memory ran out. For CPU tensors torch has no such class, so the message is searched."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory", "could not create a primitive\n"  # the second one is oneDNN's
    return any(text in f"{error}\n" for text in on_cpu) or isinstance(error, (torch.OutOfMemoryError, MemoryError))
