"""What a run shows and writes of itself: lines, metrics.csv and evaluation.csv."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.common.files import write_csv
from simplclip.common.plotting import any_text
from simplclip.common.progress import Pace, duration, print_lines
from simplclip.evaluation.index import Index
from simplclip.evaluation.results import Recall
from simplclip.evaluation.sheets import contact_sheet
from simplclip.models.presets import Tokenizer
from simplclip.models.registry import cut_in_words
from simplclip.ops import registry
from simplclip.train.config import Config
from simplclip.train.curves import NAMES, read_figures, rise, write_curves
from simplclip.train.objective import terms_of
from simplclip.train.rates import describe
from simplclip.train.resolve import Resolved
from simplclip.train.setup import State


class Log:
    """The log of a run: lines on the console, and CSV files in the run's folder.

    In a terminal, within `status`, one line changes with the steps; elsewhere a line is printed
    from time to time.

    A run that continues removes the CSV rows of steps after the step at which it continues, so that
    it ends with the same rows as an uninterrupted run. It removes the rows of that step too if it
    makes up an evaluation that had failed.
    """

    def __init__(self, state: State, console: Console) -> None:
        """Opens TensorBoard's files, if set; InputError if the CSV files cannot be continued."""
        self.state = state
        self.console = console
        self.live = console.is_terminal
        self.out, self.start = Path(state.config.run.out), state.step
        self.pace = Pace(at_most=0.25) if self.live else Pace()
        self.status: Any = console.status("first step") if self.live else contextlib.nullcontext()
        # of a step, and of waiting for its data; smoothed over about the last 20 steps
        self.seconds = self.waiting = 0.0
        self._columns: dict[str, list[str]] = {}
        self._reports: set[str] = set()  # lines that are printed once
        for name in ("metrics", "evaluation"):
            ranks.on_first(read_figures, self.out / f"{name}.csv")
        self.board: Any = None
        if state.config.run.tensorboard and ranks.first():
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard leaves out what an earlier start wrote of later steps.
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
        registry.forget_calls()  # of earlier runs of this process
        self.restart_clock()

    def print(self, message: str) -> None:
        """Prints a message, see `print_lines`."""
        print_lines(message, self.console)

    def restart_clock(self) -> None:
        """Starts the time of the next step, after work that does not belong to a step."""
        self._began = self._loaded = time.perf_counter()

    def end_loading(self) -> None:
        """Ends the time that the next step waits for its data; to be called when it has come."""
        self._loaded = time.perf_counter()

    def write_step(self, row: dict[str, float]) -> None:
        """Shows what `train_step` returned, by time, and writes it every run.log_every steps.

        Prints the backends of the ops after the first step, since they depend on what it computed.
        row: gets, in place, "samples_per_s", "data_share" (the wait for data) and "peak_mb" (MiB).
        """
        run, now = self.state.config.run, time.perf_counter()
        if not self.seconds:
            ran = registry.backends_of_calls(self.state.device).items()
            lines = [f"{op} by {' and '.join(names)}" for op, names in ran]
            self.print(f"ops        {', '.join(lines) or 'none in the first step'}")
        share = 0.05 if self.seconds else 1.0
        self.seconds += share * (now - self._began - self.seconds)
        self.waiting += share * (self._loaded - self._began - self.waiting)
        row["samples_per_s"] = self.state.config.data.batch_size / self.seconds
        row["data_share"] = self.waiting / self.seconds
        row["peak_mb"] = hardware.peak_memory_mb(self.state.device)
        last = self.state.step == run.steps
        if last or self.pace.due():
            line = self._line(row)
            if self.live and not last:
                self.status.update(line)
            else:
                self.print(line)
        if last or self.state.step % run.log_every == 0:
            self.write("metrics", row)

    def _line(self, row: Mapping[str, float]) -> str:
        """Returns the line of a step: the time since the start, the time left, `row`'s figures."""
        step, steps = self.state.step, self.state.config.run.steps or 0
        left = duration(self.seconds * (steps - step))
        parts = [
            f"step {step}/{steps}",
            f"{duration(self.pace.seconds)} gone, {left} left",
            f"loss {row['loss']:.3f}",
        ]
        terms = terms_of(row)
        if len(terms) > 1:
            parts += [f"{term} {row[column]:.3f}" for column, term in terms.items()]
        parts += [f"lr {row['lr']:.2e}", f"scale {row['logit_scale']:.1f}"]
        if "logit_bias" in row:
            parts.append(f"bias {row['logit_bias']:.1f}")
        parts += [
            f"{row['samples_per_s']:.0f} samples/s",
            f"waiting for data {row['data_share']:.0%}",
            f"peak {row['peak_mb']:.0f} MiB{hardware.describe_gpu(self.state.device)}",
        ]
        return "  ".join(parts)

    def print_skipped(self, name: str, index: Index) -> None:
        """Prints once in a run how many samples of a split were skipped, if some were."""
        line = f"evaluation {name}: {index.report()}"
        if index.skipped.counts and line not in self._reports:
            self._reports.add(line)
            self.print(line)

    def write_evaluation(self, split: str, direction: str, recall: Recall, loss: float) -> None:
        """Writes and prints R@k of one direction of a split; loss: of both directions."""
        row: dict[str, float | str] = {
            "step": self.state.step,
            "split": split,
            "direction": direction,
        }
        row |= {name: figure["value"] for name, figure in recall.items()}
        row["loss"] = loss
        row |= {f"chance {name}": figure["chance"] for name, figure in recall.items()}
        self.write("evaluation", row)
        figures = "  ".join(
            f"{name} {figure['value']:.1%} (chance {figure['chance']:.1%})"
            for name, figure in recall.items()
        )
        self.print(f"evaluation {split} {direction.replace('_', ' ')}: {figures}")

    def write(self, name: str, row: Mapping[str, float | str]) -> None:
        """Appends a row to NAME.csv in the run's folder, on the first rank, and to TensorBoard.

        row: "step", and figures or words by column. The first row of the file decides the columns;
        others are left out.
        """
        if not ranks.first():
            return
        path = self.out / f"{name}.csv"
        if name not in self._columns:
            self._columns[name] = self._begin_csv(path, row)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns[name], "", "ignore", lineterminator="\n")
            writer.writerow(row)
        if self.board:
            labels = [str(row[label]) for label in NAMES if label in row]
            for key in row.keys() - {"step", *NAMES}:
                tag = "/".join([name, *labels, key])
                self.board.add_scalar(tag, row[key], int(row["step"]))
            self.board.flush()  # before a checkpoint of this step is written

    def _begin_csv(self, path: Path, row: Mapping[str, float | str]) -> list[str]:
        """Removes rows of later steps from a CSV file, or begins one; returns its columns."""
        former = read_figures(path)
        first = min(self.start + 1, int(row["step"]))  # step that this run writes
        rows = [old for old in former if int(old["step"]) < first]
        columns = list(rows[0] if rows else row)
        write_csv(path, columns, rows)
        return columns

    def write_curves(self) -> None:
        """Draws curves.png; files that something else has changed cost the picture alone."""
        try:
            write_curves(self.out)
        except InputError as error:
            self._warn(f"no curves.png: {error}")

    def end_evaluation(self) -> None:
        """Draws the curves after an evaluation, and warns once in a run of a loss that rises."""
        self.write_curves()
        with contextlib.suppress(InputError):  # of which the line above warns
            if risen := rise(read_figures(self.out / "evaluation.csv"), self.state.step):
                self._warn(risen)

    def _warn(self, text: str) -> None:
        """Prints a warning; the same one once in a run."""
        if text not in self._reports:
            self._reports.add(text)
            self.print(f"warning    {text}")

    def write_sheet(self, name: str, index: Index) -> None:
        """Adds the sheet of a split with captions to TensorBoard, if run.tensorboard is set."""
        if self.board and index.captions:
            with any_text():
                sheet = contact_sheet(index, f"step {self.state.step}: {name}")
                self.board.add_figure(f"evaluation/{name}", sheet, self.state.step)
            self.board.flush()


def first_lines(state: State, why_precision: str, resolved: Resolved) -> Iterator[str]:
    """Yields a run's lines before its first step, each with its topic."""
    config = state.config
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in state.model.parameters())
    yield f"model      {config.model.name}: {total:,} parameters, of which {trained:,} train"
    yield from state.lines
    yield from _data_lines(config, resolved.samples)
    yield f"loss       {_loss(state)}"
    yield from describe(state.optimizer, state.model, config)
    processes = f"CPU threads: {torch.get_num_threads()}; loader processes: {config.data.workers}"
    if ranks.count() > 1:
        processes = f"ranks: {ranks.count()}, of each {processes}"
    yield (f"device     {state.device}, precision {state.precision} ({why_precision}); {processes}")
    if config.optim.warmup > (config.run.steps or 0):
        yield (
            f"warning    optim.warmup = {config.optim.warmup:,} is longer than the run: the rate "
            "does not reach optim.lr"
        )


def _data_lines(config: Config, samples: int | None) -> Iterator[str]:
    """Yields the lines about the data: its size, and what is held out."""
    size = config.data.batch_size
    steps = config.run.steps or 0
    captions = config.data.captions_per_image
    drawn = f"{captions} {'caption' if captions == 1 else 'captions'} drawn of each"
    if samples is None:
        yield (
            f"data       {drawn} image; the number of images is not known without a meta.json: "
            "--set data.samples=N tells it"
        )
    else:
        epochs = f"{samples / size:,.1f} steps an epoch, {steps * size / samples:,.1f} epochs"
        yield f"data       {samples:,} images, {drawn}; {epochs}"
    if config.eval.hold_out:
        yield f"held out   eval.hold_out={config.eval.hold_out:g} of all images"


def lines_on_captions(batch: Mapping[str, Any], tokenize: Tokenizer) -> Iterator[str]:
    """Yields lines about a batch's captions: three examples, and how many are cut."""
    for key, record, captions in list(zip(batch["key"], batch["meta"], batch["captions"]))[:3]:
        yield f"caption    {record.get('source', key)}: {' | '.join(captions)[:90]}"
    if cut := cut_in_words(tokenize, [caption for drawn in batch["captions"] for caption in drawn]):
        yield f"warning    {cut}"


def _loss(state: State) -> str:
    """Returns the loss of a run in words: its class, terms, teacher, scale and bias."""
    terms = ", ".join(term.replace("_", " ") for term in state.config.loss.weights)
    if state.teacher:
        terms += f", to stored features of {state.teacher['name']}"
    scale = f"{state.model.logit_scale.exp().item():.4g}"
    if state.logit_bias is not None:
        scale += f", bias {state.logit_bias.item():.4g}"
    return f"{type(state.objective.loss).__name__}: {terms}; scale {scale}"
