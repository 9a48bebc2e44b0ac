"""Interleaved timing and allocator peaks, shared by the benchmarks and the tests of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from simplclip.memory.measure import cpu_peak_bytes

Value = TypeVar("Value")
PASSES = {False: "forward", True: "forward + backward"}


class Times(dict[str, list[float]]):
    """Seconds of each run by case, until all kernels are done. `host`: until the last kernel is started. `device`: from the
    first to the last kernel on the GPU. `failed`: the reasons of cases that raised an error."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__({name: [] for name in names})
        self.host: dict[str, list[float]] = {name: [] for name in self}
        self.device: dict[str, list[float]] = {name: [] for name in self}
        self.failed: dict[str, str] = {}


def interleaved_times(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    strict: bool = True,
) -> Times:
    """Times `repeats` runs of each case, taken in turn (A B C A B C ...) so that drift of the machine hits all cases alike.

    strict: an error of a case is raised; else the case is left out from then on.
    """
    times = Times(cases)
    for turn in range(warmup + repeats):
        for name, run in cases.items():
            if name in times.failed:
                continue
            try:
                first, last = _mark(), _mark()
                _synchronize()
                start = clock()
                first.record()
                run()
                last.record()
                host = clock() - start
                _synchronize()
                whole = clock() - start
            except Exception as error:
                if strict:
                    raise
                times.failed[name] = reason(error)
                continue
            if turn >= warmup:
                times[name].append(whole)
                times.host[name].append(host)
                times.device[name].append(first.elapsed_time(last) / 1e3)
    for name in times.failed:
        times.pop(name)
    return times


class _Moment:
    """A stand-in for torch.cuda.Event where there is no GPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Moment) -> float:  # milliseconds
        return 1e3 * (end.at - self.at)


def _mark():
    return torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else _Moment()


def reason(error: Exception) -> str:
    """Returns a line that says why a form did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def attempted(
    forms: Mapping[str, Callable[[], Value]],
    wrong: Callable[[str, Value, Value], str],
    base: str = "simplclip",
    strict: bool = True,
) -> tuple[dict[str, Value], dict[str, str]]:
    """Runs each form. Returns the values, and the reasons of forms that are left out: out of memory, or a wrong value.

    wrong(name, value, value of `base`) says what is wrong, "" if nothing is. strict: other errors and wrong values are
    raised; else they are reasons too.
    """
    values: dict[str, Value] = {}
    reasons: dict[str, str] = {}
    for name, run in forms.items():
        try:
            values[name] = run()
        except Exception as error:
            if strict and not isinstance(error, torch.OutOfMemoryError):
                raise
            reasons[name] = reason(error)
        if name in reasons and torch.cuda.is_available():  # outside the handler, which holds the failed form's tensors
            torch.cuda.empty_cache()
    for name in [name for name in values if name != base and base in values]:
        if text := wrong(name, values[name], values[base]):
            if strict:
                raise AssertionError(text)
            reasons[name] = text
            del values[name]
    return values, reasons


def clock_of_steps() -> tuple[str, Callable[[], float]]:
    """Returns name and clock for steps of seconds: with one thread processor time, which load changes little; else wall."""
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        return "processor", time.process_time
    return "wall", time.perf_counter


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Returns the highest sum of live bytes of torch's allocator on the device during `run`, above those before it."""
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
    """Returns p20, p50 and p80."""
    if len(values) < 2:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def figures(times: dict[str, list[float]], form: str, base: str = "simplclip") -> dict[str, float]:
    """Returns columns of a row: a form's quantiles in milliseconds, and its median divided by `base`'s."""
    p20, p50, p80 = quantiles(times[form])
    milliseconds = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
    ratio = round(p50 / quantiles(times[base])[1], 2) if base in times else ""
    return {**{name: round(1e3 * seconds, 2) for name, seconds in milliseconds.items()}, "times_ours": ratio}


def apart(times: Times, form: str) -> dict[str, float]:
    """Returns columns of a row: medians of the host's and of the device's milliseconds."""
    sides = {"host_ms": times.host[form], "device_ms": times.device[form]}
    return {name: round(1e3 * quantiles(seconds)[1], 3) for name, seconds in sides.items()}


def row_of(
    row: dict, times: Times, form: str, reasons: Mapping[str, str], strict: bool, base: str = "simplclip"
) -> dict:  # fmt: skip
    """Adds the figures of a form to a row. If not strict, also adds medians of host and device, and a failure's reason."""
    if form in times:
        row |= figures(times, form, base) | ({} if strict else apart(times, form))
    return row if strict else row | {"note": reasons.get(form, "")}
