"""Output of a run's figures: metrics.csv, curves.png, and printed lines."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, visible
from simplclip.common.files import write_csv
from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write
from simplclip.common.progress import Pace, duration
from simplclip.train.settings import RunConfig


class Reporter:
    """Prints messages and the progress of a run: a line that changes in a terminal, within `status`, else lines by time."""

    def __init__(self, console: Console, config: RunConfig, device: torch.device):
        self.console, self.steps, self.device, self.live = console, config.steps, device, console.is_terminal
        self.pace = Pace(at_most=0.25) if self.live else Pace()
        self.status: Any = console.status("first step") if self.live else contextlib.nullcontext()

    def print(self, message: str) -> None:
        self.console.print(visible(message, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, row: Mapping[str, float], seconds_left: float) -> None:
        last = step == self.steps
        if not (last or self.pace.due()):
            return
        terms = "  ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in row.items() if name.endswith("_loss"))
        bias = f"  bias {row['logit_bias']:.1f}" if "logit_bias" in row else ""
        line = (
            f"step {step}/{self.steps}  {duration(self.pace.seconds)} gone, {duration(seconds_left)} left  "
            f"loss {row['loss']:.3f}  {terms}  lr {row['lr']:.2e}  scale {row['logit_scale']:.1f}{bias}  "
            f"{row['samples_per_s']:.0f} samples/s  waiting for data {row['data_share']:.0%}  peak {row['peak_mb']:.0f} MiB"
            f"{hardware.describe_gpu(self.device)}"
        )
        if self.live and not last:
            self.status.update(line)
        else:
            self.print(line)


class RunLog:
    """The files metrics.csv (a row per logged step) and evaluation.csv (a row per split and direction).

    start: the step after which the run continues. Later rows are removed, so that an interrupted and resumed run has the same
    rows as an uninterrupted one.
    """

    def __init__(self, out: Path, start: int):
        self.out, self.start = out, start
        self._columns: dict[str, list[str]] = {}

    def write(self, name: str, row: Mapping[str, float | str]) -> None:
        """Adds a row to NAME.csv: "step", and figures or words. The first row that is written decides the columns."""
        if not ranks.first():
            return
        path = self.out / f"{name}.csv"
        if name not in self._columns:
            self._columns[name] = columns = list(row)
            write_csv(path, columns, [row for row in _rows(path, columns) if int(row["step"]) <= self.start])
        with path.open("a", newline="", encoding="utf-8") as lines:
            csv.DictWriter(lines, self._columns[name], lineterminator="\n").writerow(row)


def _rows(path: Path, columns: list[str] | None = None) -> list[dict[str, str]]:
    """Reads the rows of a CSV file, without a last line that a crash cut short. Raises InputError for other `columns`."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader([line for line in file if line.endswith("\n")])
    found = list(rows.fieldnames or columns or ())
    if columns and found != columns:
        raise InputError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found)}")
    return [row for row in rows if row["step"].isdigit() and None not in row and None not in row.values()]


def curves(run: str | Path) -> Path | None:
    """Draws RUN/curves.png: from RUN/metrics.csv the loss and its terms, learning rate, logit scale and gradient norm; from
    RUN/evaluation.csv, if there is one, R@k of each split.

    Returns None if no row has been logged yet.
    """
    run = Path(run)
    rows = _rows(run / "metrics.csv")
    if not rows:
        return None
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    terms = [name for name in columns if name.endswith("_loss")]
    logits: list[str] = [name for name in ("logit_scale", "logit_bias") if name in columns]
    panels: dict[str, list[str]] = {"Loss": ["loss", *terms], "Learning rate": ["lr"], "Logit scale and bias": logits}
    panels |= {"Gradient norm before clipping": ["grad_norm"]}
    evaluated = _rows(run / "evaluation.csv")
    height = 6.4 + 2.8 * bool(evaluated)
    figure = new_figure(11, height)
    margins = {"left": 0.055, "right": 0.98, "top": 1 - 0.9 / height, "bottom": 0.55 / height}
    axes = figure.subplots(2 + bool(evaluated), 2, gridspec_kw={"hspace": 0.34, "wspace": 0.14, **margins})
    for axis, (title, names) in zip(axes.flat, panels.items()):
        lines = {name.removesuffix("_loss").replace("_", " "): (columns["step"], columns[name]) for name in names}
        _panel(axis, title, lines, noisy=names[0] in ("loss", "grad_norm"))
    ks = [name for name in (evaluated or [{}])[0] if name.startswith("R@")]
    for axis, direction in zip(axes[2] if evaluated else (), ("image_to_text", "text_to_image")):
        lines = {}
        for split in dict.fromkeys(row["split"] for row in evaluated):
            mine = [row for row in evaluated if (row["split"], row["direction"]) == (split, direction)]
            steps = np.array([int(row["step"]) for row in mine])
            lines |= {f"{split} {k}": (steps, np.array([100 * float(row[k]) for row in mine])) for k in ks if mine}
        _panel(axis, f"{direction.replace('_', ' ').capitalize()}, R@k in %", lines)
    for axis in axes[-1]:
        axis.set_xlabel("step", color=MUTED)
    figure.suptitle(run.name, color=INK, fontsize=14, fontweight="bold", x=0.055, y=1 - 0.22 / height, ha="left")
    return write(figure, run / "curves.png")


def _panel(axis, title: str, lines: dict[str, tuple[np.ndarray, np.ndarray]], noisy: bool = False) -> None:
    """Draws lines: label -> (steps, values). noisy: also draw the smoothed values."""
    for (line, colour), (label, (steps, values)) in zip(itertools.product(("-", "--", ":"), COLOURS), lines.items()):
        marker = "." if len(values) < 20 else ""  # a single value is no line
        if noisy and len(values) > 20:
            axis.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            window = np.ones(2 * max(1, len(values) // 40) + 1)  # a twentieth of the run, fewer rows at its ends
            values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
        axis.plot(steps, values, line, color=colour, linewidth=1.8, marker=marker, label=f"{label}: {values[-1]:.3g}")
    style(axis, title)
    shown = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])  # a gradient in fp16 may overflow
    axis.set_ylim(1.08 * shown.min(initial=0), 1.08 * shown.max(initial=0) or 1)
    axis.set_xlim(0, max(steps.max() for steps, _ in lines.values()) or 1)
    axis.yaxis.set_major_formatter("{x:.3g}")
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)
