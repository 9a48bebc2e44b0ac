"""Output of a run's figures: metrics.csv, curves.png, and a progress bar or plain lines."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from simplclip.common.errors import InputError, visible
from simplclip.common.files import write_csv
from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write
from simplclip.common.progress import Pace, duration

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU's allocator, or of the process's resident set on a CPU (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class _Bar(Progress):
    """The bar, and a line of figures below it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["figures"], style="dim")


class Reporter:
    """Shows progress: a bar in a terminal, within the context `progress`, else lines.

    print_every: steps between two lines; None: by time.
    """

    def __init__(self, console: Console, steps: int, start: int, print_every: int | None):
        self.console, self.steps, self.print_every, self.pace = console, steps, print_every, Pace()
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=40), *times
        hidden = not console.is_terminal
        self.progress = _Bar(*columns, console=console, disable=hidden, refresh_per_second=4, speed_estimate_period=60)
        self.task = self.progress.add_task("", total=steps, completed=start, figures="")

    def print(self, message: str) -> None:
        self.console.print(visible(message, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, row: Mapping[str, float], seconds_left: float) -> None:
        terms = "  ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in row.items() if name.endswith("_loss"))
        bias = f"  bias {row['logit_bias']:.1f}" if "logit_bias" in row else ""
        figures = (
            f"loss {row['loss']:.3f}  {terms}  lr {row['lr']:.2e}  scale {row['logit_scale']:.1f}{bias}  "
            f"{row['samples_per_s']:.0f} samples/s  waiting for data {row['data_share']:.0%}  peak {row['peak_mb']:.0f} MiB"
        )
        if not self.progress.disable:
            self.progress.update(self.task, completed=step, figures=figures)
        elif step == self.steps or (step % self.print_every == 0 if self.print_every else self.pace.due()):
            times = f"{duration(self.pace.seconds)} gone, {duration(seconds_left)} left"
            self.print(f"step {step}/{self.steps}  {times}  {figures}")


class RunLog:
    """metrics.csv (a row per logged step) and evaluation.csv (one per split and direction).

    start: the step after which the run continues. Later rows are removed, so that an interrupted and resumed run has the same
    rows as an uninterrupted one.
    """

    def __init__(self, out: Path, start: int):
        self.out, self.start = out, start
        self._tables: dict[str, csv.DictWriter] = {}
        self._open = ExitStack()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, *_) -> None:
        """Closes all files. An error of a full disk is raised, unless another error is being handled."""
        try:
            self._open.close()
        except OSError:
            if kind is None:
                raise

    def write(self, name: str, row: Mapping[str, float | str]) -> None:
        """Add a row to NAME.csv, of "step" and figures or words; its first row decides the columns."""
        if name not in self._tables:
            path, columns = self.out / f"{name}.csv", list(row)
            write_csv(path, columns, [row for row in _rows(path, columns) if int(row["step"]) <= self.start])
            lines = self._open.enter_context(path.open("a", buffering=1, newline="", encoding="utf-8"))
            self._tables[name] = csv.DictWriter(lines, columns, lineterminator="\n")
        self._tables[name].writerow(row)


def _rows(path: Path, columns: list[str] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, without a last line that a crash cut short. Raises InputError for other `columns`."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader([line for line in file if line.endswith("\n")])
    # Before its terms had this library's names, a run's relational term had open_clip's.
    rows.fieldnames = [name.replace("distill_loss", "relational_loss") for name in rows.fieldnames or ()]
    found = list(rows.fieldnames or columns or ())
    if columns and found != columns:
        raise InputError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found)}")
    return [row for row in rows if row["step"].isdigit() and None not in row and None not in row.values()]


def curves(run: str | Path) -> Path | None:
    """RUN/curves.png from RUN/metrics.csv: loss and its terms, learning rate, scale and gradient norm; and from
    RUN/evaluation.csv, if there is one: R@k of each split.

    Returns None if no row has been logged yet.
    """
    run = Path(run)
    rows = _rows(run / "metrics.csv")
    if not rows:
        return None
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    step = columns["step"]
    terms = [name for name in columns if name.endswith("_loss")]
    evaluated = _rows(run / "evaluation.csv")
    height = 6.4 + 2.8 * bool(evaluated)
    figure = new_figure(11, height)
    margins = {"left": 0.055, "right": 0.98, "top": 1 - 0.9 / height, "bottom": 0.55 / height}
    axes = figure.subplots(2 + bool(evaluated), 2, gridspec_kw={"hspace": 0.34, "wspace": 0.14, **margins})
    logits: list[str] = [name for name in ("logit_scale", "logit_bias") if name in columns]
    scale = "Logit scale and bias" if logits[1:] else "Logit scale"
    panels: dict[str, list[str]] = {"Loss": ["loss", *terms], "Learning rate": ["lr"], scale: logits}
    panels["Gradient norm before clipping"] = ["grad_norm"]
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for colour, name in zip(COLOURS, names):
            values = columns[name]
            noisy = len(values) > 20 and name not in ("lr", "logit_scale", "logit_bias")
            if noisy:
                axis.plot(step, values, color=colour, alpha=0.22, linewidth=0.8)
                window = np.ones(2 * max(1, len(values) // 40) + 1)  # a twentieth of the run, fewer rows at its ends
                values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
            label = name.removesuffix("_loss").replace("_", " ")
            axis.plot(step, values, color=colour, linewidth=1.8, label=f"{label}: {values[-1]:.3g}")
        style(axis, title)
        axis.set_xlim(0, max(step[-1], 1))
        shown = np.array([columns[name] for name in names])
        shown = shown[np.isfinite(shown)]  # a gradient may overflow where GradScaler tries a scale
        axis.set_ylim(1.08 * shown.min(initial=0), 1.08 * shown.max(initial=0) or 1)
        axis.yaxis.set_major_formatter("{x:.3g}")
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    for axis, direction in zip(axes[2] if evaluated else (), ("image_to_text", "text_to_image")):
        _recalls(axis, direction, evaluated, step[-1])
    for axis in axes[-1]:
        axis.set_xlabel("step", color=MUTED)
    figure.suptitle(run.name, color=INK, fontsize=14, fontweight="bold", x=0.055, y=1 - 0.22 / height, ha="left")
    return write(figure, run / "curves.png")


def _recalls(axis, direction: str, rows: list[dict[str, str]], last: float) -> None:
    """R@k of each split over the steps: a colour for each split, a line style for each k."""
    ks = [name for name in rows[0] if name.startswith("R@")]
    for colour, split in zip(itertools.cycle(COLOURS), dict.fromkeys(row["split"] for row in rows)):
        mine = [row for row in rows if (row["split"], row["direction"]) == (split, direction)]
        for line, k in zip(("-", "--", ":"), ks):
            values = [100 * float(row[k]) for row in mine]
            label = f"{split} {k}: {values[-1]:.1f}%" if values else ""
            steps = [int(row["step"]) for row in mine]
            axis.plot(steps, values, line, color=colour, linewidth=1.8, marker=".", label=label)
    style(axis, direction.replace("_", " ").capitalize() + ", R@k in %")
    axis.set_xlim(0, max(last, 1))
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)
