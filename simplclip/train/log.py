"""What a run shows and writes of itself: lines by time, metrics.csv and evaluation.csv,
curves.png.
"""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, visible
from simplclip.common.files import read_csv, write_csv
from simplclip.common.plotting import Panel, png
from simplclip.common.plotting import curves as draw_curves
from simplclip.common.progress import Pace, duration
from simplclip.data import Division
from simplclip.evaluation.results import Recall
from simplclip.evaluation.sheets import sheet_of
from simplclip.nn import SimplifiedBlock
from simplclip.ops import backends
from simplclip.train.setup import State


class Log:
    """The log of a run: a line that changes in a terminal, within `status`, else lines by time; and
    CSV files in its folder.

    Rows of a CSV file after the step at which the run continues are removed, so that an interrupted
    and resumed run has the same rows as an uninterrupted one; so are rows of that step if its
    evaluation, which had failed, is made up.
    """

    def __init__(self, state: State, console: Console) -> None:
        self.state = state
        self.console = console
        self.live = console.is_terminal
        self.out, self.start = Path(state.config.run.out), state.step
        self.pace = Pace(at_most=0.25) if self.live else Pace()
        self.status: Any = console.status("first step") if self.live else contextlib.nullcontext()
        self.seconds = self.waiting = 0.0  # of a step, smoothed over about the last 20
        self._columns: dict[str, list[str]] = {}
        self.board: Any = None
        if state.config.run.tensorboard and ranks.first():
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier start wrote of later steps is left out by TensorBoard. metrics.csv is
            # the record.
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
        self.restart_clock()

    def print(self, message: str) -> None:
        self.console.print(
            visible(message, keep="\n"), markup=False, highlight=False, soft_wrap=True
        )

    def restart_clock(self) -> None:
        """Starts the time of the next step, after work that does not belong to a step."""
        self._began = self._loaded = time.perf_counter()

    def loaded(self) -> None:
        """Ends the time that a step waits for its data."""
        self._loaded = time.perf_counter()

    def step(self, row: dict[str, float]) -> None:
        """Completes the figures of a step by its times, shows them if a line is due, and writes
        them if a row is.
        """
        run, now = self.state.config.run, time.perf_counter()
        share = 0.05 if self.seconds else 1.0
        self.seconds += share * (now - self._began - self.seconds)
        self.waiting += share * (self._loaded - self._began - self.waiting)
        row |= {
            "samples_per_s": self.state.config.data.batch_size / self.seconds,
            "data_share": self.waiting / self.seconds,
        }
        row |= {"peak_mb": hardware.peak_memory_mb(self.state.device)}
        last = self.state.step == run.steps
        if last or self.pace.due():
            line = self._line(row)
            self.print(line) if last or not self.live else self.status.update(line)
        if last or self.state.step % run.log_every == 0:
            self.write("metrics", row)

    def _line(self, row: Mapping[str, float]) -> str:
        steps = self.state.config.run.steps or 0
        terms = [name for name in row if name.endswith("_loss")]
        shown = [
            f"{name.removesuffix('_loss')} {row[name]:.3f}"
            for name in (terms if len(terms) > 1 else ())
        ]
        bias = [f"bias {row['logit_bias']:.1f}"] if "logit_bias" in row else []
        parts = [
            f"step {self.state.step}/{steps}",
            f"{duration(self.pace.seconds)} gone, "
            f"{duration(self.seconds * (steps - self.state.step))} left",
            *(
                f"loss {row['loss']:.3f}",
                *shown,
                f"lr {row['lr']:.2e}",
                f"scale {row['logit_scale']:.1f}",
                *bias,
            ),
            f"{row['samples_per_s']:.0f} samples/s",
            f"waiting for data {row['data_share']:.0%}",
            f"peak {row['peak_mb']:.0f} MiB{hardware.describe_gpu(self.state.device)}",
        ]
        return "  ".join(parts)

    def evaluation(self, split: str, direction: str, figures: Recall, loss: float) -> None:
        """Writes R@k with its chance, and the loss of the split, which is that of both
        directions.
        """
        row: dict[str, float | str] = {
            "step": self.state.step,
            "split": split,
            "direction": direction,
        }
        row |= {k: figure.value for k, figure in figures.items()} | {"loss": loss}
        self.write(
            "evaluation", row | {f"chance {k}": figure.chance for k, figure in figures.items()}
        )
        shown = "  ".join(
            f"{k} {figure.value:.1%} (chance {figure.chance:.1%})" for k, figure in figures.items()
        )
        self.print(f"evaluation {split} {direction.replace('_', ' ')}: {shown}")

    def write(self, name: str, row: Mapping[str, float | str]) -> None:
        """Adds a row to NAME.csv: "step", and figures or words.

        The first row of the file decides the columns.
        """
        if not ranks.first():
            return
        path = self.out / f"{name}.csv"
        if name not in self._columns:
            former = read_csv(path)
            if any(not row.get("step", "").isdigit() for row in former):
                raise InputError(
                    f"run.out: expected rows with the number of a step in {path}, got others"
                )
            rows = [
                old for old in former if int(old["step"]) < min(self.start + 1, int(row["step"]))
            ]
            self._columns[name] = list(rows[0] if rows else row)
            write_csv(path, self._columns[name], rows)
        with path.open("a", newline="", encoding="utf-8") as lines:
            csv.DictWriter(lines, self._columns[name], "", "ignore", lineterminator="\n").writerow(
                row
            )
        if self.board:
            place = [name, *(str(row[part]) for part in ("split", "direction") if part in row)]
            for key in row.keys() - {"step", "split", "direction"}:
                self.board.add_scalar("/".join([*place, key]), row[key], int(row["step"]))
            self.board.flush()  # before a checkpoint of this step is written

    def sheet(self, name: str, split: Any) -> None:
        """Shows the evaluation sheet of an encoded split in TensorBoard."""
        if self.board and split.image_features is not None and split.text_features is not None:
            figure = sheet_of(split, f"step {self.state.step}: {name}").figure
            pixels = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))
            self.board.add_image(f"evaluation/{name}", pixels, self.state.step, dataformats="HWC")
            self.board.flush()


def first_lines(
    state: State, why_precision: str, samples: int | None, division: Division | None = None
) -> Iterator[str]:
    """Yields a run's lines before its first step, each with its topic. samples: of an epoch, None
    if they are not counted. division: what eval.hold_out makes of the data.
    """
    config = state.config
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in state.model.parameters())
    yield f"model      {config.model.name}: {total:,} parameters, of which {trained:,} train"
    yield from state.lines
    k = config.data.captions_per_image
    size = config.data.batch_size
    steps = config.run.steps or 0
    drawn = f"{k} caption{'s' * (k > 1)} drawn of each"
    if samples is None:
        yield (
            f"data       {drawn} image; their number is not known without a meta.json: --set "
            "data.samples=855 tells it"
        )
    else:
        epochs = f"{samples / size:,.1f} steps an epoch, {steps * size / samples:,.1f} epochs"
        yield f"data       {samples:,} images, {drawn}; {epochs}"
        if size > samples:
            yield (
                f"warning    of {samples:,} images, each comes {size / samples:,.4g} times in a "
                f"batch of {size:,}"
            )
    if division:
        repeated = (
            f"{division.repeated:,} of their {division.captions:,} captions stand verbatim in "
            "training"
        )
        yield (
            f"held out   {division.held_out:,} images, eval.hold_out={config.eval.hold_out:g} of "
            f"all; {repeated}"
        )
    terms = ", ".join(term.removesuffix("_loss").replace("_", " ") for term in config.loss.weights)
    of_teacher = f", to stored features of {state.teacher['name']}" if state.teacher else ""
    bias = "" if state.logit_bias is None else f", bias {state.logit_bias.item():.4g}"
    scale = state.model.logit_scale.exp().item()
    yield (
        f"loss       {type(state.objective.loss).__name__}: {terms}{of_teacher}; scale "
        f"{scale:.4g}{bias}"
    )
    yield f"ops        {_backends(state)}"
    several = f"ranks: {ranks.count()}, of each " if ranks.count() > 1 else ""
    threads = f"CPU threads: {torch.get_num_threads()}; loader processes: {config.data.workers}"
    yield (
        f"device     {state.device}, precision {state.precision} ({why_precision}); "
        f"{several}{threads}"
    )
    if config.optim.warmup > steps:
        yield (
            f"warning    optim.warmup = {config.optim.warmup:,} is longer than the run: the rate "
            "does not reach optim.lr"
        )


def _backends(state: State) -> str:
    """Returns the ops of a step with their backends."""
    calls: dict[str, dict[str, Any]] = {}
    for block in (
        module for module in state.model.modules() if isinstance(module, SimplifiedBlock)
    ):
        calls |= {
            "parallel_mlp_fwd": {},
            "shaped_attention_fwd": {"width": block.width // block.heads, "length": 197},
        }
    calls |= {
        "similarity_sigmoid" if state.config.loss.base == "sigmoid" else "similarity_loss_fwd": {}
    }
    where = (state.device, hardware.DTYPES[state.precision] or torch.float32, backends.forced())
    return ", ".join(
        f"{op} by {backends.select(op, *where, **call)[0]}" for op, call in calls.items()
    )


def curves(run: Path) -> None:
    """Draws RUN/curves.png from RUN/metrics.csv and, if there is one, RUN/evaluation.csv."""
    rows, evaluated = read_csv(run / "metrics.csv"), read_csv(run / "evaluation.csv")
    if not rows:
        return
    terms = [name for name in rows[0] if name.endswith("_loss")]
    columns = {
        "Loss": ["loss", *(terms if len(terms) > 1 else [])],
        "Learning rate": ["lr"],
        "Logit scale": ["logit_scale"],
    }
    columns |= {"Gradient norm before clipping": ["grad_norm"], "Logit bias": ["logit_bias"]}
    scales = ("Logit scale", "Gradient norm before clipping", "Logit bias")
    panels = [
        Panel(title, _lines(rows, names), from_zero=title not in scales)
        for title, names in columns.items()
        if names[0] in rows[0]
    ]
    splits = dict.fromkeys(row["split"] for row in evaluated)
    for place, split in enumerate(splits, 1):
        of_split = [row for row in evaluated if row["split"] == split]
        panel = Panel(
            f"{split}: right one among the first k; dotted: chance", {}, {}, percent=True, solid=3
        )
        for direction, words in (("image_to_text", "to text"), ("text_to_image", "to image")):
            part = [row for row in of_split if row["direction"] == direction]
            for k in [name for name in part[0] if name.startswith("R@")]:
                (line,) = _lines(part, [k]).values()
                panel.lines[f"{words} {k}"] = line
                if f"chance {k}" in part[0]:
                    panel.chance[f"{words} {k}"] = float(part[-1][f"chance {k}"])
        panels.insert(place, panel)
        if "loss" in of_split[0]:
            panels[0].lines[split] = _lines(of_split[::2], ["loss"])["loss"]
    draw_curves(run / "curves.png", panels, _best_step(evaluated))


def _best_step(evaluated: list[dict[str, str]]) -> int | None:
    """Returns the first step of the highest mean R@1."""
    recalls: dict[int, list[float]] = {}
    for row in evaluated:
        recalls.setdefault(int(row["step"]), []).append(float(row["R@1"]))
    return max(
        recalls, key=lambda step: (sum(recalls[step]) / len(recalls[step]), -step), default=None
    )


def _lines(
    rows: list[dict[str, str]], names: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    steps = np.array([int(row["step"]) for row in rows])
    labels = (name.removesuffix("_loss").replace("_", " ") for name in names)
    return {
        label: (steps, np.array([float(row[name] or "nan") for row in rows]))
        for label, name in zip(labels, names)
    }
