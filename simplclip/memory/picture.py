"""Draws a plan: the memory during a step, and its peak by batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write
from simplclip.memory.plan import Plan

KIND_COLOURS = ("#495057", "#0b6bcb", "#74c0fc", "#adb5bd", "#d9480f", "#7048e8", "#ffc078", "#c2255c")
FRAME = "#d0d7de"


def draw(path: str | Path, plan: Plan) -> Path:
    """Live memory by kind during the second step as configured; and the peak by batch size, with the usable memory."""
    gib = 2**30
    figure = new_figure(13, 4.8)
    step, batch = figure.subplots(
        1, 2, gridspec_kw={"wspace": 0.16, "left": 0.055, "right": 0.985, "top": 0.8, "bottom": 0.12}
    )
    kinds, live, phases = plan.usage.timeline()
    step.stackplot(range(len(live[0])), np.array(live) / gib, labels=kinds, colors=KIND_COLOURS[: len(kinds)], linewidth=0)
    for (first, name), (last, _) in zip(phases, [*phases[1:], (len(live[0]), "")]):
        if last - first > len(live[0]) / 12:
            at = {"transform": step.get_xaxis_transform(), "ha": "center"}
            step.text((first + last) / 2, 1.02, name, fontsize=8, color=MUTED, **at)
        step.axvline(first, color=FRAME, linewidth=0.5)
    style(step, "")
    step.set_xlim(0, len(live[0]))
    step.set_xlabel("allocations and frees of the step as configured", color=MUTED)
    step.set_ylabel("GiB", color=MUTED)
    step.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", reverse=True)

    for colour, answer in zip(COLOURS, [a for a in plan.answers if a.peaks]):
        peaks = np.array(sorted(answer.peaks.items()))
        label = f"{answer.what}: {answer.batch_size:,}"
        batch.plot(peaks[:, 0], peaks[:, 1] / gib, "o-", color=colour, markersize=3.5, linewidth=1.5, label=label)
    batch.axhline(plan.budget.usable / gib, color=INK, linewidth=1, linestyle="--")
    batch.text(0.99, plan.budget.usable / gib, "usable", fontsize=9, color=INK, ha="right", va="bottom",
               transform=batch.get_yaxis_transform())  # fmt: skip
    style(batch, "Peak by pairs of a step")
    batch.set_xscale("log")
    batch.set_yscale("log")
    batch.set_ylim(top=8 * plan.budget.usable / gib)
    batch.yaxis.set_major_formatter("{x:g}")
    if batch.get_legend_handles_labels()[0]:
        batch.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    title = f"{plan.model}, {plan.precision}, {plan.budget.memory / gib:.0f} GiB"
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.055, y=0.96, ha="left")
    return write(figure, Path(path))
