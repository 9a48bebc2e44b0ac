"""Trains the runs of a study, some of which differ from a base, and compares them.

    python -m benchmarks.study benchmarks/ablation.yaml --out runs/ablation --only 'pair *'

A study is a YAML file. Settings are those of `--set`; lists may be nested:

    config: examples/emoji/siclip-lite0.yaml       # or a config itself
    seeds: 3                                       # 2 to 5
    set: [run.steps=150]                           # of every run
    runs:
      alone: {set: [loss.pm_weight=0]}
      pair matching: {base: alone, set: [loss.pm_weight=1], seeds: 5}

Each run is `simplclip train` and `simplclip evaluate` in OUT/NAME-SEED. A run that has been
evaluated is not done again, so that the same command continues after a stop; a run of other
settings needs another name. In settings `OUT` and `SEED` are replaced. With `blend: true` blends
with the run's start are evaluated too.

OUT/study.csv has R@1 in per cent, the mean of both directions, for each split and the mean over
all: mean and standard deviation over the seeds; and beside a base the difference, paired by seed,
with its 95 % interval (Student's t). Of 20 changes without any effect, one interval excludes 0.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from simplclip.evaluation import SplitResult, first_right

STUDENT = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645}  # of 95 % in two tails, by seeds
Recalls = dict[str, float]  # R@1 by split, "all" for the mean


def flat(value: list) -> list[str]:
    items = []
    for part in value:
        items += flat(part) if isinstance(part, list) else [part]
    return items


def go(folder: Path, config: str, settings: list[str], blend: bool) -> None:
    """Trains and evaluates a run, unless that is done. Exits if a command fails."""
    if (folder / "evaluation.json").exists():
        return
    print(f"\n{folder}", flush=True)
    training = ["train", config, "--resume"]
    for setting in settings:
        training += ["--set", setting]
    blends = [["evaluate", str(folder), "--last", "--blend"]] if blend else []
    for command in (training, *blends, ["evaluate", str(folder), "--last"]):
        process = subprocess.run([sys.executable, "-m", "simplclip", *command])
        if process.returncode:
            sys.exit(f"{folder}: {command[0]} ended with {process.returncode}")


def recalls_of(splits: dict[str, SplitResult]) -> Recalls:
    found = {name: 100 * first_right(split)["value"] for name, split in splits.items()}
    return {"all": statistics.fmean(found.values()), **found}


def recalls_in(folder: Path) -> dict[str, Recalls]:
    """Returns R@1 of a run, under "", and of its blends."""
    result = json.loads((folder / "evaluation.json").read_text())
    found = {"": recalls_of(result["splits"])}
    blends = folder / "blend.json"
    if blends.exists():
        for row in json.loads(blends.read_text())["rows"]:
            found[f", alpha {row['alpha']:g}"] = recalls_of(row["splits"])
    return found


def rows_of(name: str, found: list[Recalls], base: list[Recalls] | None) -> Iterator[dict]:
    """Yields a row for each split. found: by seed. base: what to compare with, by seed."""
    for split in found[0]:
        values = [recalls[split] for recalls in found]
        row: dict[str, Any] = {"run": name, "split": split, "seeds": len(values)}
        row |= {"R@1": statistics.fmean(values), "std": statistics.stdev(values)}
        if base is not None:
            differences = [value - recalls[split] for value, recalls in zip(values, base)]
            mean = statistics.fmean(differences)
            half = STUDENT[len(values)] * statistics.stdev(differences) / math.sqrt(len(values))
            row |= {"difference": mean, "low": mean - half, "high": mean + half}
        yield {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


class Study:
    """The runs of a study's file."""

    def __init__(self, file: Path, out: Path) -> None:
        values = yaml.safe_load(file.read_text("utf-8"))
        self.out, self.config, self.runs = out, values["config"], values["runs"]
        self.seeds, self.settings = values["seeds"], values.get("set", [])
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(self.config, dict):
            (out / "config.yaml").write_text(yaml.safe_dump(self.config))
            self.config = str(out / "config.yaml")

    def seeds_of(self, name: str) -> int:
        return self.runs[name].get("seeds", self.seeds)

    @functools.cache  # noqa: B019 (there is one study)
    def result(self, name: str, seed: int) -> dict[str, Recalls]:
        """Returns R@1 of a run, which is trained first, and of its blends."""
        run = self.runs[name]
        folder = self.out / f"{name}-{seed}".replace(" ", "-")
        settings = [f"run.seed={seed}", f"run.out={json.dumps(str(folder))}"]
        for setting in flat([self.settings, run.get("set", [])]):
            settings.append(setting.replace("OUT", str(self.out)).replace("SEED", str(seed)))
        go(folder, self.config, settings, run.get("blend", False))
        return recalls_in(folder)

    def rows(self, name: str) -> Iterator[dict]:
        """Yields the rows of a run and of its blends."""
        seeds, base = range(self.seeds_of(name)), self.runs[name].get("base")
        beside = [self.result(base, seed)[""] for seed in seeds] if base else None
        found = [self.result(name, seed) for seed in seeds]
        for form in found[0]:
            recalls = [result[form] for result in found]
            yield from rows_of(f"{name}{form}", recalls, None if form else beside)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs of this name, and bases")
    options = parser.parse_args(arguments)
    study, rows = Study(options.study, options.out), []
    for name in study.runs:
        if fnmatchcase(name, options.only):
            rows += study.rows(name)
    if not rows:
        parser.error(f"--only: expected a name of {options.study}, got {options.only}")
    with open(options.out / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.out / 'study.csv'}")


if __name__ == "__main__":
    main()
