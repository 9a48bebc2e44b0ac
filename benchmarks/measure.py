"""Interleaved timing, and the rows of result files that all benchmarks make by it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from simplclip.common.hardware import cpu_peak_bytes

BASE = "simplclip"  # the form by whose time the others' times are divided
PASSES = {False: "forward", True: "forward + backward"}


@dataclass
class Times:
    """Seconds of each run; on a GPU also until its last kernel starts, and of its kernels."""

    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def choose_clock() -> tuple[str, Callable[[], float]]:
    """Returns name and clock: with one thread processor time, which others change little."""
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        return "processor", time.process_time
    return "wall", time.perf_counter


def interleaved_times(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, strict: bool = True
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times runs of the cases, which take turns so that drift of the machine hits all alike.

    Returns the times, and the reasons of cases that failed. strict: an error of a case is raised.
    """
    _, clock = choose_clock()
    times, reasons = {name: Times() for name in cases}, dict[str, str]()
    for turn in range(warmup + repeats):
        for name in [name for name in cases if name not in reasons]:
            run = Times()
            try:
                _time(cases[name], clock, run)
            except Exception as error:
                if strict:
                    raise
                reasons[name] = reason(error)
                del times[name]
                continue
            if turn >= warmup:
                for column in ("whole", "host", "device"):
                    getattr(times[name], column).extend(getattr(run, column))
    return times, reasons


def _time(run: Callable[[], object], clock: Callable[[], float], times: Times) -> None:
    if not torch.cuda.is_available():
        start = clock()
        run()
        times.whole.append(clock() - start)
        return
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = clock()
    first.record()
    run()
    last.record()
    times.host.append(clock() - start)
    torch.cuda.synchronize()
    times.whole.append(clock() - start)
    times.device.append(first.elapsed_time(last) / 1e3)


def reason(error: Exception) -> str:
    """Returns a line that says why a form did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _first_runs(
    cases: Mapping[str, Callable[[], Any]],
    wrong: Callable[[str, Any, Any], str] | None,
    base: str,
    strict: bool,
) -> dict[str, str]:
    """Runs each case once; returns the reasons of those that are left out."""
    values, reasons = dict[str, Any](), dict[str, str]()
    for name, run in cases.items():
        try:
            values[name] = run()
        except Exception as error:
            if strict and not isinstance(error, torch.OutOfMemoryError):
                raise
            reasons[name] = reason(error)
        # outside the handler, which holds the failed form's tensors
        if name in reasons and torch.cuda.is_available():
            torch.cuda.empty_cache()
    for name, value in values.items():
        text = wrong(name, value, values[base]) if wrong and base in values else ""
        if text and strict:
            raise AssertionError(text)
        if text:
            reasons[name] = text
    return reasons


def compare(
    what: dict[str, Any],
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    first: Mapping[str, Callable[[], Any]] | None = None,
    wrong: Callable[[str, Any, Any], str] | None = None,
    base: str = BASE,
    warmup: int = 1,
    strict: bool = True,
) -> list[dict[str, Any]]:
    """Measures cases that take turns; returns a row of a result file for each.

    first: what to run of each case before, in place of the case itself. wrong(form, value, value of
    `base`) says what is wrong with the value that this returns, "" if nothing is. strict: errors
    but those of memory, and wrong values, are raised; else the row says why it has no figures.
    """
    reasons = _first_runs(first or cases, wrong, base, strict)
    usable = {name: run for name, run in cases.items() if name not in reasons}
    times, failed = interleaved_times(usable, repeats, warmup, strict)
    reasons |= failed
    how = {"threads": torch.get_num_threads(), "clock": choose_clock()[0], "repeats": repeats}
    rows = []
    for name in cases:
        row = {**what, "form": name, **how}
        if name in times:
            milliseconds = [round(1e3 * seconds, 2) for seconds in quantiles(times[name].whole)]
            row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), milliseconds))
            row["times_ours"] = _ratio(times, name, base)
            row |= {
                f"{side}_ms": round(1e3 * statistics.median(seconds), 3)
                for side, seconds in (("host", times[name].host), ("device", times[name].device))
                if seconds
            }
        rows.append(row | {"note": reasons.get(name, "")})
    return rows


def _ratio(times: Mapping[str, Times], name: str, base: str) -> float | str:
    if base not in times:
        return ""
    return round(statistics.median(times[name].whole) / statistics.median(times[base].whole), 2)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Returns p20, p50 and p80."""
    if len(values) < 2:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def peak_mib(run: Callable[[], object], device: str = "cpu") -> float:
    """Returns the highest sum of live MiB on the device during `run`, above those before it."""
    if device == "cpu":
        return cpu_peak_bytes(run) / 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20
