"""Whole models on a GPU: steps of the SiCLIPs beside the models that they were made from, memory, batches, and the loader.

The weights are random. A step of a SiCLIP is a step of `simplclip train`: unchanged parts are inherited and frozen, with pair
matching and distillation from stored features. A step of the other model is open_clip's, with its contrastive loss and all
weights trained.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import loader
from benchmarks.gpu.ops import Case
from benchmarks.measure import attempted, interleaved_times, row_of
from benchmarks.steps import OpenClipStep, measure, runner
from benchmarks.training_forms import PRECISION
from simplclip import models
from simplclip.memory.measure import predict
from simplclip.memory.plan import MOST_PAIRS, Budget, largest
from simplclip.memory.step import Step, TrainerStep
from simplclip.train import config

TEACHER_WIDTH = 768
PAIRS = 128  # of a step
CPU_BYTES = 112 << 20  # memory that a step may take where there is no card, to try this program
PHOTOS = 768
NO_TEACHER = ["data.captions_per_image=1", "data.sidecars=[]", "loss.contrastive_weight=1"]
NO_TEACHER += [f"loss.{name}_weight=0" for name in ("feature", "relational", "interactive")]


def makers(name: str, dtype: str) -> dict[str, Callable[[int], Step]]:
    """Returns functions that make a step of so many pairs: for a config's model, and for the model that it was made from."""

    def ours(pairs: int) -> Step:
        changes = ["data.micro_batch=null", "data.captions_per_image=1", f"data.batch_size={pairs}", "loss.pm_weight=1"]
        return TrainerStep(config.load(name, changes), PRECISION[dtype], TEACHER_WIDTH)

    model = config.load(name, []).model.name
    other = models.original(model)
    theirs = {f"{other}, whole": lambda pairs: OpenClipStep(other, pairs, PRECISION[dtype])} if other else {}
    return {model: ours, **theirs}


def steps(o: argparse.Namespace) -> Iterator[Case]:
    for dtype in o.dtypes.split(","):
        for name in o.models.split(","):
            yield Case("steps", f"{name} {dtype}", partial(of_steps, o, name, dtype))


def of_steps(o: argparse.Namespace, name: str, dtype: str) -> list[dict]:
    """Measures the time of a step, and its peak memory beside the prediction of `simplclip plan`."""
    pairs, device = max(2, int(PAIRS * o.sequences)), torch.device(o.device)
    made = makers(name, dtype)
    peaks = {form: lambda make=make: measure(make(pairs), device) for form, make in made.items()}
    measured, reasons = attempted(peaks, lambda *_: "", next(iter(made)), strict=False)
    cases = {}
    for form, make in made.items():
        if form in measured:
            cases[form] = runner(make(pairs), device)
    times = interleaved_times(cases, o.repeats, strict=False)
    reasons |= times.failed
    rows = []
    for form, make in made.items():
        what = {"op": "steps", "shape": f"{pairs} pairs", "n": pairs, "dtype": dtype, "form": form, "repeats": o.repeats}
        row = row_of(what, times, form, reasons, strict=False, base=next(iter(made)))
        if form in times:
            row["samples_per_s"] = round(pairs / statistics.median(times[form]), 1)
            row["mib"] = round(measured[form] / 2**20, 1)
            row["predicted_mib"] = round(predict(make(pairs), on(o.device)).peak / 2**20, 1)
        rows.append(row)
    return rows


def on(device: str) -> torch.device:
    """Returns the device with an index, as the tensors of a plan have it."""
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)


def batches(o: argparse.Namespace) -> Iterator[Case]:
    for dtype in o.dtypes.split(","):
        for name in o.models.split(","):
            yield Case("batches", f"{name} {dtype}", partial(of_batches, o, name, dtype))


def of_batches(o: argparse.Namespace, name: str, dtype: str) -> list[dict]:
    """Finds the largest batch of a step in one graph by trying, beside the prediction of `simplclip plan`."""
    rows, device, card = [], torch.device(o.device), o.device == "cuda"
    budget = Budget(torch.cuda.mem_get_info()[1]) if card else Budget(CPU_BYTES, context=0, libraries=0)

    def fits(pairs: int, make: Callable[[int], Step]) -> bool:
        """Whether a step of so many pairs fits: on a card in its memory, on a CPU in the usable part of the budget."""
        try:
            return measure(make(pairs), device) <= (budget.memory if card else budget.usable)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    for form, make in makers(name, dtype).items():
        peak = lambda n, make=make: predict(make(n), on(o.device)).peak  # noqa: E731
        planned, _ = largest(peak, budget.usable, range(1, MOST_PAIRS), start=PAIRS)
        found = bisected(planned, partial(fits, make=make))
        row = {"op": "batches", "dtype": dtype, "form": form, "pairs": found, "predicted_pairs": planned}
        rows.append(row | {"usable_mib": budget.usable >> 20})
    return rows


def bisected(start: int, fits: Callable[[int], bool], tries: int = 7) -> int:
    """Returns the largest number known to fit after a few tries: growing steps away from `start`, then halving the gap."""
    low, high, stride = 0, 0, max(1, start // 16)
    guess = max(1, start)
    for _ in range(tries):
        if fits(guess):
            low = guess
        else:
            high = guess
        if low and high:
            guess = (low + high) // 2
        else:
            guess = low + stride if low else max(1, high - stride)
            stride *= 2
        if guess in (low, high):
            break
    return low


@functools.cache
def photos(count: int) -> tempfile.TemporaryDirectory:
    """Makes shards of test images that decode like photographs. The shards are removed when this process ends."""
    folder = tempfile.TemporaryDirectory()
    loader.make(Path(folder.name), count)
    return folder


def fed(o: argparse.Namespace) -> Iterator[Case]:
    for dtype in o.dtypes.split(","):
        name = o.models.split(",")[0]
        yield Case("loader", f"{name} {dtype}", partial(of_loader, o, name, dtype))


def of_loader(o: argparse.Namespace, name: str, dtype: str) -> list[dict]:
    """Measures the pairs a second of the loader alone, and of training from the loader with its share of time in waiting."""
    pairs, workers = max(2, int(PAIRS * o.sequences)), min(8, os.cpu_count() or 1)
    shards = f"{photos(max(8, int(PHOTOS * o.sequences))).name}/photos-*.tar"
    found = config.load(name, [])
    side = models.create(found.model.name).visual.image_size
    side = side if isinstance(side, int) else side[0]
    alone, _ = loader.rate(loader.ours(shards, side, workers, pairs), workers, 10 * min(1.0, o.sequences))
    row = {"op": "loader", "n": pairs, "dtype": dtype, "workers": workers}
    rows = [row | {"form": "the loader alone", "samples_per_s": round(alone, 1)}]
    with tempfile.TemporaryDirectory() as folder:
        changes = [*NO_TEACHER, f"data.train={shards}", f"data.batch_size={pairs}", "data.micro_batch=null"]
        changes += [f"data.workers={workers}", "eval.splits={}", f"run.out={folder}/run", "run.log_every=5"]
        changes += [f"run.precision={PRECISION[dtype]}", f"run.steps={20 if o.sequences < 1 else 60}", "optim.warmup=2"]
        changes.append(f"run.device={o.device}")
        if found.inherit.source:
            torch.save(models.create(models.original(found.model.name)).state_dict(), f"{folder}/source.pt")
            changes.append(f"inherit.source={folder}/source.pt")
        command = [sys.executable, "-m", "simplclip", "train", name]
        command += [word for change in changes for word in ("--set", change)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            return [*rows, row | {"form": "trained from it", "note": (run.stderr.strip() or "failed").splitlines()[-1]}]
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            logged = list(csv.DictReader(file))[2:]  # after the first steps, which compile
    medians = {key: statistics.median(float(line[key]) for line in logged) for key in ("samples_per_s", "data_share")}
    return [*rows, row | {"form": "trained from it", **{key: round(value, 3) for key, value in medians.items()}}]
