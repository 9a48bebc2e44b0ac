"""curves.png of a run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write


def curves(run: str | Path) -> Path | None:
    """RUN/curves.png from RUN/metrics.csv: loss and its terms, learning rate, scale and gradient norm.

    Returns None if no row has been logged yet.
    """
    run = Path(run)
    path = run / "metrics.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    if not rows:
        return None
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    step = columns["step"]
    terms = [name for name in columns if name.endswith("_loss")]
    figure = new_figure(11, 6.4)
    margins = {"left": 0.055, "right": 0.98, "top": 0.86, "bottom": 0.085}
    axes = figure.subplots(2, 2, gridspec_kw={"hspace": 0.34, "wspace": 0.14, **margins})
    panels = {"Loss": ["loss", *terms], "Learning rate": ["lr"], "Logit scale": ["logit_scale"]}
    panels["Gradient norm before clipping"] = ["grad_norm"]
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for colour, name in zip(COLOURS, names):
            values = columns[name]
            noisy = len(values) > 20 and name not in ("lr", "logit_scale")
            if noisy:
                axis.plot(step, values, color=colour, alpha=0.22, linewidth=0.8)
                window = np.ones(2 * max(1, len(values) // 40) + 1)  # a twentieth of the run, fewer rows at its ends
                values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
            label = name.removesuffix("_loss").replace("_", " ")
            axis.plot(step, values, color=colour, linewidth=1.8, label=f"{label}: {values[-1]:.3g}")
        style(axis, title)
        axis.set_xlim(0, max(step[-1], 1))
        axis.set_ylim(0, 1.08 * max(columns[name].max() for name in names) or 1)
        axis.yaxis.set_major_formatter("{x:.3g}")
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    for axis in axes[1]:
        axis.set_xlabel("step", color=MUTED)
    figure.suptitle(run.name, color=INK, fontsize=14, fontweight="bold", x=0.055, y=0.965, ha="left")
    return write(figure, run / "curves.png")
