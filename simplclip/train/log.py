"""What a run shows and writes of itself: lines, metrics.csv, evaluation.csv and curves.png."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from simplclip.common import hardware, ranks
from simplclip.common.plotting import GREY, any_text, shortened, write
from simplclip.common.progress import Pace, duration, print_lines
from simplclip.evaluation.index import Index
from simplclip.evaluation.results import Recall
from simplclip.evaluation.sheets import contact_sheet
from simplclip.models.presets import Tokenizer
from simplclip.models.registry import cut_in_words
from simplclip.ops import registry
from simplclip.train.config import Config
from simplclip.train.objective import terms_of
from simplclip.train.optimizer import describe
from simplclip.train.resolve import Resolved
from simplclip.train.setup import State

Points = tuple[list[int], list[float]]  # steps and values of a line
NAMES = ("split", "direction")  # columns of evaluation.csv without figures
COLUMNS = ("lr", "logit_scale", "logit_bias", "grad_norm")  # with a panel of their own


class Log:
    """The log of a run: lines on the console, and CSV files in the run's folder.

    In a terminal, within `status`, one line changes with the steps; elsewhere a line is printed
    from time to time.

    Rows are appended to the CSV files. A run that continues may write a step again, whose last row
    counts, see `read_figures`.
    """

    def __init__(self, state: State, console: Console) -> None:
        """Opens TensorBoard's files, if set."""
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
            self._columns[name] = _columns_of(path) or [*row]
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns[name], "", "ignore", lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        if self.board:
            labels = [str(row[label]) for label in NAMES if label in row]
            for key in row.keys() - {"step", *NAMES}:
                tag = "/".join([name, *labels, key])
                self.board.add_scalar(tag, row[key], int(row["step"]))
            self.board.flush()  # before a checkpoint of this step is written

    def write_curves(self) -> None:
        """Draws curves.png; files that something else has changed cost the picture alone."""
        try:
            write_curves(self.out)
        except (ValueError, KeyError) as error:
            got = f"expected figures by step in CSV files, got others: {error}"
            self.print(f"warning    no curves.png: {got}")

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


def _columns_of(path: Path) -> list[str]:
    """Returns the columns of a CSV file, [] if there is none; ends a line that is cut short."""
    if not path.exists():
        return []
    text = path.read_text("utf-8", "replace")
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")
    return next(csv.reader(text.splitlines()), [])


def read_figures(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's CSV file by column, in the order of steps; [] without a file.

    Of several rows of one step the last one counts; lines with more or fewer values than columns,
    which a crash has left, do not. Raises ValueError or KeyError without a step.
    """
    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text("utf-8", "replace").splitlines())
    whole = [row for row in rows if None not in row and None not in row.values()]
    last = {(int(row["step"]), *map(row.get, NAMES)): row for row in whole}
    return sorted(last.values(), key=lambda row: int(row["step"]))


def write_curves(run: Path) -> None:
    """Draws RUN/curves.png from metrics.csv, unless it is empty, and evaluation.csv, if any."""
    rows, evaluated = read_figures(run / "metrics.csv"), read_figures(run / "evaluation.csv")
    if not rows:
        return
    # by panel and label: steps and values
    panels: dict[str, dict[str, Points]] = {"loss": {}}
    terms = terms_of(rows[0])
    for row in rows:
        _add(panels["loss"], "training", row, "loss")
        for column, term in terms.items() if len(terms) > 1 else ():
            _add(panels["loss"], term.replace("_", " "), row, column)
        for column in COLUMNS:
            _add(panels.setdefault(column, {}), column, row, column)
    for row in evaluated:
        _add(panels["loss"], row["split"], row, "loss")
        recalls = panels.setdefault(f"{row['split']} (dotted: chance)", {})
        for column in row:
            if column.startswith(("R@", "chance R@")):
                label = f"{row['direction']} {column}".replace("_", " ")
                _add(recalls, label, row, column)
    panels = {title: lines for title, lines in panels.items() if lines}
    with any_text():
        figure = Figure(figsize=(8, 2 * len(panels)), dpi=100, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, lines) in zip(axes, panels.items()):
            _draw(axis, title, lines, _best_step(evaluated))
        axes[-1].set_xlabel("step; dashed: the best evaluation")
        write(figure, run / "curves.png")


def _add(lines: dict[str, Points], label: str, row: dict[str, str], column: str) -> None:
    """Adds the value that a row has in a column, if any, to the line of a label."""
    if row.get(column):
        steps, values = lines.setdefault(label, ([], []))
        steps.append(int(row["step"]))
        values.append(float(row[column]))


def _draw(axis: Axes, title: str, lines: dict[str, Points], best: int | None) -> None:
    """Draws the lines of a panel; those of chance are dotted, in the colours of the others."""
    colours: dict[str, Any] = {}
    for label, (steps, values) in lines.items():
        name = label.replace("chance ", "")
        is_chance = name != label
        (line,) = axis.plot(steps, values, ":" if is_chance else ".-", color=colours.get(name))
        colours[name] = line.get_color()
        if not is_chance:
            line.set_label(f"{shortened(label, 40)}: {values[-1]:.3g}")
    if best is not None:
        axis.axvline(best, color=GREY, linestyle="--", linewidth=1)
    axis.set_title(shortened(title, 90), fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="upper left", ncols=2)
    axis.grid(alpha=0.3)


def _best_step(evaluated: list[dict[str, str]]) -> int | None:
    """Returns the first step of the highest R@1, averaged over the rows of a step."""
    recalls: dict[int, list[float]] = {}
    for row in evaluated:
        recalls.setdefault(int(row["step"]), []).append(float(row["R@1"]))
    means = {step: sum(values) / len(values) for step, values in recalls.items()}
    return max(means, key=lambda step: (means[step], -step), default=None)
