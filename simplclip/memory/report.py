"""The command `simplclip plan`: a plan as text, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from simplclip.common.plotting import COLOURS, FRAME, INK, MUTED, new_figure, style, write
from simplclip.common.tables import table
from simplclip.memory.plan import Plan, make, parse_memory
from simplclip.train.limits import GIB, Budget, gib
from simplclip.train.settings import Config

KIND_COLOURS = ("#495057", "#0b6bcb", "#74c0fc", "#adb5bd", "#d9480f", "#7048e8", "#ffc078", "#c2255c")


def run(config: Config, memory: str, *, picture: Path | None = None, as_json: bool = False, **options: Any) -> None:
    """Makes the plan and prints it; progress is printed to stderr. The options and the errors are those of `plan.make`."""
    progress = Console(stderr=True)
    budget = Budget(parse_memory(memory))
    with progress.status("planning"):
        plan = make(config, budget, **options)
    if as_json:
        print(json.dumps(as_dict(plan), indent=2))
    else:
        show(plan, Console())
    if picture:
        draw(picture, plan)
        progress.print(f"wrote {picture}", highlight=False)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan without the timeline; sizes are in bytes."""
    values = asdict(plan)
    usage = values.pop("usage")
    return values | {"components": usage["at_peak"], "peak_phase": usage["peak_phase"]}


def show(plan: Plan, console: Console) -> None:
    """Prints tables of the answers and of the memory at the peak, assumptions and advice."""
    at = plan.usage
    answers = []
    for answer in plan.answers:
        larger = "" if answer.next_peak is None else f"{answer.next_batch_size:,}: {answer.next_peak / GIB:.2f}"
        sizes = f"{answer.batch_size:,}", _at_a_time(answer.micro_batch), gib(answer.peak)
        answers.append((answer.what, *sizes, "yes" if answer.fits else "no", larger))
    parts = [
        (kind, f"{size / 2**20:,.1f}", f"{size / at.peak:.1%}") for kind, size in [*at.at_peak.items(), ("total", at.peak)]
    ]
    tables = [
        table(("step", "pairs", "at a time", "peak", "fits", "next larger, GiB"), answers, numbers=True),
        table((f"at the peak, in {at.peak_phase}", "MiB", "share"), parts, numbers=True),
        *_exchange(plan.exchange),
    ]
    head = f"{plan.model}, {plan.precision}, {plan.device}: {gib(plan.usable)} usable of {gib(plan.memory)}"
    if plan.ranks > 1:
        head += f"; each of {plan.ranks} ranks"
    for part in (head, *tables):
        console.print(part, highlight=False)
    measured = "nothing: predicted from fake tensors" + ", no step ran on a GPU" * (plan.device == "cuda")
    if plan.measured is not None:
        measured = f"two real steps on this machine's GPU: {gib(plan.measured)}, predicted {gib(at.peak)}"
    advice = plan.advice or ["none: nothing known here would lower the peak"]
    if at.peak <= plan.usable / 2:
        advice = [f"fits, nothing to do: {at.peak / plan.usable:.0%} of the usable memory"]
    for name, lines in ("measured", [measured]), ("assumed", plan.assumptions), ("advice", advice):
        for line in lines:
            console.print(f"{name:10} {line}", markup=False, highlight=False, soft_wrap=True)


def _exchange(exchange: dict[str, Any]) -> list[Table]:
    if not exchange:
        return []
    sent, computing = exchange["sent"], exchange["computing"]
    what = [(name, f"{size / 2**20:,.1f}") for name, size in [*sent.items(), ("total", sum(sent.values()))]]
    columns, times = ["over a link of its own", "ms"], []
    if computing is not None:
        columns.append(f"of {1e3 * computing:,.0f} ms of computation")
    for link, seconds in exchange["seconds"].items():
        times.append((link, f"{1e3 * seconds:,.1f}", *([f"{seconds / computing:.1%}"] if computing else [])))
    return [table(("a rank sends in a step", "MiB"), what, numbers=True), table(columns, times, numbers=True)]


def _at_a_time(micro_batch: int | dict[str, int | None] | None) -> str:
    if isinstance(micro_batch, dict):
        return ", ".join(f"{_at_a_time(size)} {tower}" for tower, size in micro_batch.items())
    return f"{micro_batch:,}" if micro_batch else "all"


def draw(path: str | Path, plan: Plan) -> Path:
    """Draws live memory by kind during the second step as configured, and the peak by batch size with the usable memory."""
    figure = new_figure(13, 4.8)
    step, batch = figure.subplots(
        1, 2, gridspec_kw={"wspace": 0.16, "left": 0.055, "right": 0.985, "top": 0.8, "bottom": 0.12}
    )
    kinds, live, phases = plan.usage.timeline()
    end = live.shape[1]
    step.stackplot(range(end), live / GIB, labels=kinds, colors=KIND_COLOURS[: len(kinds)], linewidth=0)
    for (first, name), (last, _) in zip(phases, [*phases[1:], (end, "")]):
        if last - first > end / 12:
            at = {"transform": step.get_xaxis_transform(), "ha": "center"}
            step.text((first + last) / 2, 1.02, name, fontsize=8, color=MUTED, **at)
        step.axvline(first, color=FRAME, linewidth=0.5)
    style(step, "")
    step.set_xlim(0, end)
    step.set_xlabel("allocations and frees of the step as configured", color=MUTED)
    step.set_ylabel("GiB", color=MUTED)
    step.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", reverse=True)

    usable = plan.usable / GIB
    for colour, answer in zip(COLOURS, [a for a in plan.answers if a.peaks]):
        peaks = np.array(sorted(answer.peaks.items()))
        label = f"{answer.what}: {answer.batch_size:,}"
        batch.plot(peaks[:, 0], peaks[:, 1] / GIB, "o-", color=colour, markersize=3.5, linewidth=1.5, label=label)
    batch.axhline(usable, color=INK, linewidth=1, linestyle="--")
    at = {"transform": batch.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    batch.text(0.99, usable, "usable", fontsize=9, color=INK, **at)
    style(batch, "Peak by pairs of a step")
    batch.set(xscale="log", yscale="log")
    batch.set_ylim(top=8 * usable)
    batch.yaxis.set_major_formatter("{x:g}")
    batch.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    title = f"{plan.model}, {plan.precision}, {plan.memory / GIB:.0f} GiB"
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.055, y=0.96, ha="left")
    return write(figure, Path(path))
