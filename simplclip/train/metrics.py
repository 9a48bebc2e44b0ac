"""Output of a run's figures: metrics.csv, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from simplclip.common.errors import InputError
from simplclip.common.files import write_csv

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
    """Shows progress: a bar in a terminal, within the context `progress`, else a line every `print_every` steps."""

    def __init__(self, console: Console, steps: int, start: int, print_every: int):
        self.console, self.steps, self.print_every = console, steps, print_every
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=40), *times
        rates = {"refresh_per_second": 4, "speed_estimate_period": 60}
        self.progress = _Bar(*columns, console=console, disable=not console.is_terminal, **rates)
        self.task = self.progress.add_task("", total=steps, completed=start, figures="")

    def print(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        terms = "  ".join(f"{name.removesuffix('_loss')} {v:.3f}" for name, v in row.items() if name.endswith("_loss"))
        figures = (
            f"loss {row['loss']:.3f}  {terms}  lr {row['lr']:.2e}  scale {row['logit_scale']:.1f}  "
            f"{row['samples_per_s']:.0f} samples/s  peak {row['peak_mb']:.0f} MiB"
        )
        if not self.progress.disable:
            self.progress.update(self.task, completed=step, figures=figures)
        elif step % self.print_every == 0 or step == self.steps:
            self.print(f"step {step}/{self.steps}  {figures}")


class RunLog:
    """metrics.csv (a row per logged step), evaluation.csv (one per split and direction) and TensorBoard of the same.

    start: the step after which the run continues. Later rows are removed, so that an interrupted and resumed run has the same
    rows as an uninterrupted one.
    """

    def __init__(self, out: Path, start: int, tensorboard: bool):
        self.out, self.start = out, start
        self._tables: dict[str, csv.DictWriter] = {}
        self._tensorboard, self._writer = tensorboard, None
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
        """Add a row to NAME.csv; its first row decides the columns. TensorBoard gets the numbers, named by the words.

        row: "step", and figures or words, e.g. {"step": 5, "split": "held", "R@1": 0.5} -> evaluation/held/R@1.
        """
        if name not in self._tables:
            path, columns = self.out / f"{name}.csv", list(row)
            write_csv(path, columns, rows_until(path, columns, self.start))
            lines = self._open.enter_context(path.open("a", buffering=1, newline="", encoding="utf-8"))
            self._tables[name] = csv.DictWriter(lines, columns, lineterminator="\n")
        self._tables[name].writerow(row)
        if self._tensorboard and not self._writer:  # not earlier, so that a failed start leaves no files
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
            self._writer = self._open.enter_context(writer)
        if self._writer:
            words = [value for value in row.values() if isinstance(value, str)]
            for figure, value in row.items():
                if figure != "step" and not isinstance(value, str):
                    self._writer.add_scalar("/".join([name, *words, figure]), value, row["step"])


def rows_until(path: Path, columns: list[str], step: int) -> list[dict[str, str]]:
    """Rows of a CSV file up to `step`, without a last line that a crash cut short. Raises InputError for other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader([line for line in file if line.endswith("\n")])
    if rows.fieldnames is not None and list(rows.fieldnames) != columns:
        raise InputError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(rows.fieldnames)}")
    whole = (row for row in rows if row["step"].isdigit() and None not in row and None not in row.values())
    return [row for row in whole if int(row["step"]) <= step]
