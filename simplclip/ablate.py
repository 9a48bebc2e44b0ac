"""Measures what each part of the system adds: trains the same student with one more part at a time.

Each training is a process of `simplclip train`, so that a stopped ablation can be continued.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simplclip.common.files import differences, write_atomically, write_csv
from simplclip.common.plotting import COLOURS, INK, MUTED, new_figure, style, write
from simplclip.train import config
from simplclip.train.config import Config, ConfigError

STARTS = ("scratch", "inherited")
# name of a variant -> the key of the config that is enabled from it on, in the order in which they are added
VARIANTS = {
    "contrastive": None,
    "+ pair matching": "loss.pm_weight",
    "+ unimodal": "loss.feature_weight",
    "+ relational": "loss.relational_weight",
    "+ interactive": "loss.interactive_weight",
    "+ several captions": "data.captions_per_image",
}
_OFF = {"data.captions_per_image": 1}
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Trial:
    """One training run of an ablation."""

    variant: str
    start: str
    seed: int
    folder: Path

    def changes(self) -> list[str]:
        """The settings in which its config differs from that of the ablation."""
        later = list(VARIANTS.values())[list(VARIANTS).index(self.variant) + 1 :]
        changes = [f"{key}={_OFF.get(key, 0)}" for key in later]
        changes += ["inherit.source=null"] if self.start == "scratch" else []
        return [*changes, f"run.seed={self.seed}", f"run.out={json.dumps(str(self.folder))}"]


def run(
    source: str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: int = 3,
    starts: Sequence[str] = STARTS,
    jobs: int = 1,
) -> Path:
    """Train every variant of the config `source` and evaluate it on eval.splits; returns OUT/ablation.csv.

    There are six variants, each of which adds a part to the one before. Each is trained with every one of `starts` and with
    `seeds` seeds, `jobs` runs at a time, which share the CPU's threads. Finished runs are kept, stopped ones are continued.
    ablation.csv has a row for each run, split and direction: R@1, R@5, R@10 and their chance. ablation.png shows the mean R@1
    over both directions with the standard deviation over the seeds.

    Raises: ConfigError if the config lacks a part or its settings are not those of OUT; RuntimeError if a run fails, which
    names its log.
    """
    out, base = Path(out), config.load(source, overrides)
    _check(base, starts)
    trials = [
        Trial(variant, start, seed, out / f"{start}-{list(VARIANTS).index(variant)}-{seed}")
        for seed in range(seeds)
        for start in starts
        for variant in VARIANTS
    ]
    _claim(out, base)
    todo = [trial for trial in trials if not (trial.folder / "evaluation.json").exists()]
    finished = len(trials) - len(todo)
    print(f"{len(trials)} runs of {base.run.steps} steps, {finished} of them done")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(trials), initial=finished, unit=" runs") as bar:
        waiting = [pool.submit(_train, out / "config.yaml", trial, threads) for trial in todo]
        try:
            for done in waiting:
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = [row for trial in trials for row in _rows(trial)]
    write_csv(out / "ablation.csv", list(rows[0]), rows)
    draw(out / "ablation.png", rows, f"{base.model.name}, {base.run.steps} steps, {seeds} seeds")
    return out / "ablation.csv"


def _check(base: Config, starts: Sequence[str]) -> None:
    off = [key for key in VARIANTS.values() if key and attrgetter(key)(base) == _OFF.get(key, 0)]
    if off:
        raise ConfigError(f"config: expected every part to be enabled, got a config without: {', '.join(off)}")
    unknown = [start for start in starts if start not in STARTS]
    if unknown or not starts:
        raise ConfigError(f"starts: expected some of {', '.join(STARTS)}, got {unknown or 'none'}")
    if "inherited" in starts and base.inherit.source is None:
        raise ConfigError("inherit.source: expected weights to inherit from, got null")
    if not base.eval.splits:
        raise ConfigError("eval.splits: expected held-out data, got none")


def _claim(out: Path, base: Config) -> None:
    """Check that OUT is new, or that OUT/config.yaml has the same settings."""
    path = out / "config.yaml"
    if path.exists():
        if changed := differences(config.load(path).to_dict(), base.to_dict()):
            changes = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
            raise ConfigError(f"out: expected the settings of the ablation in {out}, got others: {changes}")
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: expected a new or empty folder or that of an ablation, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, base.to_yaml())


def _train(source: Path, trial: Trial, threads: int) -> None:
    changes = [word for change in trial.changes() for word in ("--set", change)]
    steps = ["train", str(source), "--resume", *changes], ["evaluate", str(trial.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "SIMPLCLIP_THREADS": str(threads)}
    log = trial.folder.with_suffix(".log")
    with open(log, "a") as file:
        for step in steps:
            command = [sys.executable, "-m", "simplclip", *step]
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
            if code:
                name = f"{trial.variant!r}, {trial.start}, seed {trial.seed}"
                raise RuntimeError(f"the run {name} ended with {code}: see {log}")


def _rows(trial: Trial) -> Iterator[dict[str, Any]]:
    result = json.loads((trial.folder / "evaluation.json").read_text())
    for split, entry in result["splits"].items():
        for direction in DIRECTIONS:
            row = {"variant": trial.variant, "start": trial.start, "seed": trial.seed, "steps": result["step"]}
            row |= {"split": split, "direction": direction}
            row |= {k: round(figure["value"], 6) for k, figure in entry[direction].items()}
            yield row | {f"chance of {k}": round(figure["chance"], 6) for k, figure in entry[direction].items()}


def draw(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path:
    """A panel for each split: R@1 by variant and start, the mean over seeds with their standard deviation as error bar.

    rows: have "variant", "start", "seed", "split", "direction" and "R@1"; a seed's figure is the mean of both directions.
    """
    splits, variants, starts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("split", "variant", "start"))
    figure = new_figure(5.2 * len(splits) + 1.6, 4.6)
    margins = {"left": 0.06, "right": 0.985, "top": 0.8, "bottom": 0.2}
    axes = figure.subplots(1, len(splits), squeeze=False, gridspec_kw=margins)
    for axis, split in zip(axes[0], splits):
        for place, (colour, start) in enumerate(zip(COLOURS, starts)):
            means, errors = zip(*(_mean_of_seeds(rows, split, variant, start) for variant in variants))
            x = np.arange(len(variants)) + (place - (len(starts) - 1) / 2) * 0.4
            bars = axis.bar(x, means, 0.36, yerr=errors, color=colour, ecolor=INK, capsize=3, label=start)
            axis.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=2, fontsize=8, color=INK)
        style(axis, f"held-out {split}")
        axis.set_xticks(range(len(variants)), [textwrap.fill(variant, 13) for variant in variants], fontsize=8)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
        axis.set_ylabel("R@1, %", color=MUTED)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=10, labelcolor=INK, loc="upper right", ncols=len(names))
    title = f"{title}; bars: standard deviation"
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.06, y=0.95, ha="left")
    return write(figure, Path(path))


def _mean_of_seeds(rows: Sequence[Mapping[str, Any]], split: str, variant: str, start: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, in per cent."""
    mine = [row for row in rows if (row["split"], row["variant"], row["start"]) == (split, variant, start)]
    seeds = dict.fromkeys(row["seed"] for row in mine)
    figures = [100 * np.mean([row["R@1"] for row in mine if row["seed"] == seed]) for seed in seeds]
    return float(np.mean(figures)), float(np.std(figures, ddof=1)) if len(figures) > 1 else 0.0
