"""Output of a run's figures: metrics.csv, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from simplclip.common.errors import InputError
from simplclip.common.files import write_atomically

try:
    import resource
except ImportError:  # Windows
    resource = None


class CsvLog:
    """A CSV file to which each call writes one row to disk.

    columns: names, "step" among them. start: the step after which the run continues. Later rows are removed, so that an
    interrupted and resumed run has the same rows as an uninterrupted one.
    """

    def __init__(self, path: str | Path, columns: list[str], start: int = 0):
        path = Path(path)
        kept = [row for row in _complete_rows(path, columns) if int(row["step"]) <= start] if path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue())
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: Mapping[str, float]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """Rows of an earlier part of the run, without a last line that a crash cut short."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = csv.DictReader(lines)
    if rows.fieldnames is not None and list(rows.fieldnames) != columns:
        raise InputError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(rows.fieldnames)}")
    return [row for row in rows if row["step"].isdigit() and None not in row and None not in row.values()]


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
    """Shows progress: a bar in a terminal, else a line every `print_every` steps."""

    def __init__(self, console: Console, steps: int, start: int, print_every: int):
        self.console, self.steps, self.print_every = console, steps, print_every
        self.progress = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=40),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
            speed_estimate_period=60,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, figures="")

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def print(self, message: str, style: str | None = None) -> None:
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        if self.progress.disable:
            if step % self.print_every == 0 or step == self.steps:
                self.print(f"step {step}/{self.steps}  {figures(row)}")
        else:
            self.progress.update(self.task, completed=step, figures=figures(row))


def figures(row: Mapping[str, float]) -> str:
    """The main figures of a row, on one line."""
    terms = "  ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in row.items() if name.endswith("_loss"))
    return (
        f"loss {row['loss']:.3f}  {terms}  lr {row['lr']:.2e}  scale {row['logit_scale']:.1f}  "
        f"{row['samples_per_s']:.0f} samples/s  peak {row['peak_mb']:.0f} MiB"
    )


class Speed:
    """Samples per second, smoothed over about the last 20 steps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds = 0.0

    def step(self, samples: int) -> float:
        now = time.perf_counter()
        took, self.last = now - self.last, now
        self.seconds = took if not self.seconds else 0.95 * self.seconds + 0.05 * took
        return samples / self.seconds

    def pause(self) -> None:
        """Context whose time does not count, e.g. of a checkpoint or an evaluation."""
        self.last = time.perf_counter()


class RunLog:
    """metrics.csv (a row per logged step), evaluation.csv (one per split and direction) and TensorBoard of the same."""

    def __init__(self, out: Path, start: int, tensorboard: bool):
        self.out, self.start = out, start
        self._files: dict[str, CsvLog] = {}
        self._tensorboard, self._writer = tensorboard, None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, *_) -> None:
        """Closes all files. An error of a full disk is raised, unless another error is being handled."""
        failed = None
        for file in [*self._files.values(), *([self._writer] if self._writer else ())]:
            try:
                file.close()
            except OSError as error:
                failed = error
        if failed and kind is None:
            raise failed

    def write(self, file: str, row: Mapping[str, float | str]) -> None:
        """Add a row to FILE.csv; its first row decides the columns. TensorBoard gets the numbers, named by the words.

        row: "step", and figures or words, e.g. {"step": 5, "split": "held", "R@1": 0.5} -> evaluation/held/R@1.
        """
        if file not in self._files:
            self._files[file] = CsvLog(self.out / f"{file}.csv", list(row), self.start)
        self._files[file].write(row)
        if self._tensorboard and not self._writer:  # not earlier, so that a failed start leaves no files
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
        if self._writer:
            words = [value for value in row.values() if isinstance(value, str)]
            for name, value in row.items():
                if name != "step" and not isinstance(value, str):
                    self._writer.add_scalar("/".join([file, *words, name]), value, row["step"])
