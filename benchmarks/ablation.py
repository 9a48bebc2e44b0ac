"""Measures what each part of a recipe adds, by training without and with it for several seeds.

    python -m benchmarks.ablation examples/emoji/siclip-lite0.yaml --out runs/ablation \\
        --seeds 3 --jobs 2

The effects are those of a YAML file, by default benchmarks/ablation.yaml. Settings are those of
`--set`; lists may be nested:

    steps: 150                                # run.steps of every run
    set: [data.batch_size=128]                # settings of every run
    effects:
      - name: pair matching beside contrastive
        base: [loss.pm_weight=0]
        variant: [loss.pm_weight=1]
        set: [data.batch_size=64]             # of both; optional, as `steps` and `seeds`

Each run is `simplclip train` and `simplclip evaluate` in a folder that is named by a digest of its
settings. So runs of equal settings are done once, the file may change, and the same command
continues after a stop. OUT/effects.csv has R@1 of base and variant for each split and the mean over
all, and their difference, paired by seed, with its 95 % interval and the p of the paired t-test. Of
20 changes without any effect, one has p < 0.05.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BeforeValidator

from benchmarks.results_file import describe, result_path, write_csv
from simplclip.common.files import write_atomically
from simplclip.evaluation import ModelResult
from simplclip.train import config
from simplclip.train.config import Section

RESULT = "result.json"  # in the folder of a finished run: its evaluation
ALL = "all"  # the mean over the splits


def _flat(value: list) -> list[str]:
    items = []
    for part in value:
        items += _flat(part) if isinstance(part, list) else [part]
    return items


Settings = Annotated[list[str], BeforeValidator(_flat)]


class Effect(Section):
    name: str
    base: Settings
    variant: Settings
    set: Settings = []
    steps: int | None = None
    seeds: int | None = None


class Effects(Section):
    effects: list[Effect]
    set: Settings
    steps: int


class Run(NamedTuple):
    folder: Path
    settings: tuple[str, ...]


# Effects, each with its runs of base and variant by seed.
Plan = list[tuple[Effect, list[tuple[Run, Run]]]]


def load(path: Path) -> Effects:
    """Reads an effects file. Keys that begin with a dot are only places for anchors."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if not key.startswith(".")}
    return Effects.model_validate(values)


def run_of(options: argparse.Namespace, settings: list[str], seed: int) -> Run:
    """Returns the run of these settings.

    Raises ConfigError for a setting that the config does not have.
    """
    settings = [f"run.seed={seed}", *settings, *options.set]
    values = config.load(options.config, [*settings, "run.out=."]).model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    folder = options.out / digest
    return Run(folder, (*settings, f"run.out={json.dumps(str(folder))}"))


def train(
    run: Run,
    source: str,
    threads: int,
    *,
    further: Sequence[Sequence[str]] = (),
    keep: bool = False,
) -> str | None:
    """Trains and evaluates a run, and removes its checkpoint. Returns a line if it fails.

    further: options of further evaluations. keep: the checkpoint stays.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    program = [sys.executable, "-m", "simplclip"]
    training = [*program, "train", source, "--resume"]
    for setting in run.settings:
        training += ["--set", setting]
    evaluations = [
        [*program, "evaluate", str(run.folder), *options] for options in (["--last"], *further)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as file:
        for command in (training, *evaluations):
            process = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            if process.returncode:
                return f"{run.folder} ended with {process.returncode}: see {log}"
    write_atomically(run.folder / RESULT, (run.folder / "evaluation.json").read_text())
    for file in run.folder.glob("*.pt"):
        if not keep:
            file.unlink()
    return None


def recall(result: ModelResult, split: str) -> float:
    """Returns R@1 in per cent, the mean of both directions, of a split or the mean over all."""
    splits = list(result.splits.values()) if split == ALL else [result.splits[split]]
    return 100 * statistics.fmean(
        figures["R@1"].value for entry in splits for figures in entry.retrieval.directions.values()
    )


def rows_of(effect: Effect, pairs: list[list[ModelResult]]) -> Iterator[dict[str, Any]]:
    """Yields a row for all splits and for each. pairs: results of base and variant by seed."""
    from scipy import stats  # here, since it takes a second to import

    for split in (ALL, *pairs[0][0].splits):
        base = [recall(result, split) for result, _ in pairs]
        variant = [recall(result, split) for _, result in pairs]
        test = stats.ttest_rel(variant, base)
        low, high = test.confidence_interval()
        row = {"effect": effect.name, "measure": "R@1", "split": split, "seeds": len(pairs)}
        base_mean, variant_mean = statistics.fmean(base), statistics.fmean(variant)
        figures = {
            "base": base_mean,
            "base std": statistics.stdev(base),
            "variant": variant_mean,
            "variant std": statistics.stdev(variant),
            "difference": variant_mean - base_mean,
            "p": test.pvalue,
            "low": low,
            "high": high,
        }
        row |= {name: round(float(value), 4) for name, value in figures.items()}
        yield row | {"base steps": pairs[0][0].step, "variant steps": pairs[0][1].step}


def report(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Writes OUT/effects.csv with the effects of at least two finished seeds. Returns its rows."""
    rows: list[dict[str, Any]] = []
    for effect, pairs in plan:
        results = []
        for base, variant in pairs:
            files = [base.folder / RESULT, variant.folder / RESULT]
            if all(file.exists() for file in files):
                results.append(
                    [ModelResult.model_validate(json.loads(file.read_text())) for file in files]
                )
        if len(results) > 1:
            rows += rows_of(effect, results)
    if rows:
        write_csv(out / "effects.csv", rows)
    return rows


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        "python -m benchmarks.ablation", description=__doc__, formatter_class=raw
    )
    made.add_argument("config", help="YAML file or name of a built-in config")
    made.add_argument(
        "--effects",
        type=Path,
        default=Path(__file__).with_suffix(".yaml"),
        help="YAML file of effects",
    )
    made.add_argument("--out", type=Path, required=True, help="folder for the runs and effects.csv")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs"
    )
    made.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="of each effect that names no number, at least 2 (default: 3)",
    )
    made.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, which share the CPU's threads (default: 1)",
    )
    made.add_argument("--only", default="*", metavar="GLOB", help="only effects of this name")
    made.add_argument(
        "--write", action="store_true", help="write benchmarks/results/ablation-*.csv too"
    )
    return made


def planned(options: argparse.Namespace) -> Plan:
    file, plan = load(options.effects), []
    for effect in file.effects:
        if not fnmatchcase(effect.name, options.only):
            continue
        shared = [*file.set, f"run.steps={effect.steps or file.steps}", *effect.set]
        pairs = []
        for seed in range(effect.seeds or options.seeds):
            base = run_of(options, [*shared, *effect.base], seed)
            variant = run_of(options, [*shared, *effect.variant], seed)
            pairs.append((base, variant))
        plan.append((effect, pairs))
    if not plan:
        sys.exit(f"--only: expected a name of {options.effects}, got {options.only}")
    return plan


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    plan = planned(options)
    runs = {run.folder: run for _, pairs in plan for pair in pairs for run in pair}
    remaining = [run for run in runs.values() if not (run.folder / RESULT).exists()]
    done = len(runs) - len(remaining)
    print(f"{len(plan)} effects, {len(runs)} runs, {done} of them done", flush=True)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    failures: list[str] = []

    def train_one(run: Run) -> None:
        failure = train(run, options.config, threads)
        if failure:
            failures.append(failure)
        print(failure or f"done: {run.folder}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(train_one, remaining))
        except KeyboardInterrupt:  # the runs get the same signal and save their last step
            pool.shutdown(cancel_futures=True)
            sys.exit("ablation: interrupted; the same command goes on")
    rows, where = report(plan, options.out), describe()
    if options.write:
        lines = [row | where for row in rows if row["seeds"] >= 3]
        write_csv(result_path("ablation", where), lines)
    if failures:
        sys.exit("\n".join(["the same command tries these again:", *failures]))


if __name__ == "__main__":
    main()
