"""Interleaved timing and allocator peaks, shared by the benchmarks and the tests of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from simplclip.memory.measure import cpu_peak_bytes


def interleaved_times(
    cases: dict[str, Callable[[], object]], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` each, taken in turn (A B C A B C ...) so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, run in cases.items():
            _synchronize()
            start = clock()
            run()
            _synchronize()
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def clock_of_steps() -> tuple[str, Callable[[], float]]:
    """For steps of seconds: with one thread the processor's time, which a busy machine changes little; else wall time."""
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        return "processor", time.process_time
    return "wall", time.perf_counter


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Highest sum of live bytes of torch's allocator on the device during `run`, above what was live before it."""
    if device == "cpu":
        return cpu_peak_bytes(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(values) < 2:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def figures(times: dict[str, list[float]], form: str, base: str = "simplclip") -> dict[str, float]:
    """Columns of a row: a form's quantiles in milliseconds, and how many times of `base`'s median its own is."""
    p20, p50, p80 = quantiles(times[form])
    milliseconds = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
    ratio = round(p50 / quantiles(times[base])[1], 2)
    return {**{name: round(1e3 * seconds, 2) for name, seconds in milliseconds.items()}, "times_ours": ratio}
