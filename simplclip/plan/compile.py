"""Compiles Triton kernels before a run, in several processes, into Triton's cache.

A step on fake tensors says which: of the stand-ins of tensors in its launches Triton reads what it
reads of tensors. So a run on such a card finds its kernels in the cache.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_map

from simplclip.common.errors import UserError
from simplclip.common.processes import cores, end_with_parent
from simplclip.plan.kernels import Launch, Stand


class CompileError(UserError, RuntimeError):
    """Error of a kernel that does not compile, or of a process that died."""


@dataclass(frozen=True)
class Driver:
    """Triton's driver of a card that need not be there; it can only compile."""

    architecture: int

    def get_current_device(self) -> int:
        """Returns the card's name among devices."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """Returns a number that nothing reads."""
        return 0

    def get_current_target(self) -> Any:
        """Returns what Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def _form(launch: Launch) -> str:
    """Returns a text that is equal for two launches only if Triton compiles the same for both."""

    def form(value: Any) -> Any:
        """Returns what Triton may read of an argument: of numbers not all, of tensors no shape."""
        if isinstance(value, Stand):
            return value.dtype, value.data_ptr() % 16
        if type(value) is int:
            return value == 1, value % 16 == 0, value.bit_length() > 31
        return value

    # in lower case: the others are constants of the kernel and options of the compiler
    sizes = {
        name: value
        for name, value in launch.options.items()
        if name.islower() and name in launch.kernel.arg_names
    }
    constants = {name: value for name, value in launch.options.items() if name not in sizes}
    return f"{launch.kernel.__name__} {tree_map(form, (launch.args, sizes))} {constants}"


def _compile(
    module: str, name: str, args: tuple, options: dict[str, Any], architecture: int
) -> tuple[str, bool]:
    """Compiles a launch of a kernel in a module; returns its hash, and whether it was there."""
    import triton

    found = []
    triton.knobs.compilation.listener = lambda **about: found.append(about["cache_hit"])
    triton.runtime.driver.set_active(Driver(architecture))
    try:
        kernel = getattr(importlib.import_module(module), name)
        compiled = kernel.warmup(*args, grid=(1,), **options)
    except Exception as error:  # Triton's are of many types, some of which cannot be pickled
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CompileError(f"{name}: does not compile for sm_{architecture}: {line}") from None
    return compiled.hash, all(found)


def forms_of(launches: Iterable[Launch]) -> list[Launch]:
    """Returns a launch of each form in which Triton compiles the kernels of the launches."""
    return [*{_form(launch): launch for launch in launches}.values()]


def compile_launches(
    launches: Sequence[Launch], architecture: int, tell: Callable[[int], object]
) -> tuple[int, int]:
    """Compiles each launch's kernel for an architecture, e.g. 86; a process for each core.

    tell(1): is called whenever one is compiled. Returns how many kernels there are, and how many of
    them were in Triton's cache. Raises CompileError.
    """
    found: dict[str, bool] = {}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers = max(1, min(cores(), len(launches)))
    try:
        with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
            tasks = []
            for each in launches:
                kernel = each.kernel.__module__, each.kernel.__name__
                tasks.append(pool.submit(_compile, *kernel, each.args, each.options, architecture))
            try:
                for task in as_completed(tasks):
                    key, was_there = task.result()
                    found[key] = was_there and found.get(key, True)
                    tell(1)
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        raise CompileError(
            "processes: one died before its kernel was compiled (out of memory, the system kills "
            "processes); the same command goes on where it was"
        ) from None
    return len(found), sum(found.values())
