"""Compares ways to fine-tune: what they learn of new pictures, and what they forget of old ones.

    python -m benchmarks.finetune --out runs/finetune --jobs 2

A small model is trained on Twemoji's coloured drawings, and fine-tuned on the black lines of
OpenMoji's (examples/emoji/domains.py builds both). Each seed has a base model of its own. Parts
valid and test have emoji that no training has seen, the same ones in both domains.

- For each of FORMS, the learning rate with the highest R@1 on the new domain's part valid is taken,
  by runs of seed 0 alone. The other seeds train with it.
- The blend of a seed has the alpha with the highest mean R@1 of both domains' parts valid.
- The figures are those of the parts test: R@1 in per cent, the mean of both directions.

Each run is `simplclip train` and `simplclip evaluate` in a folder that is named by a digest of its
settings, so that the same command continues after a stop. OUT/finetune.csv has the mean over the
seeds with its 95 % interval (Student's t). The memory of a step is that of `simplclip plan` for a
CPU. Its processor time is measured when all runs have ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.ablation import RESULT, Run, recall, run_of, train
from benchmarks.results_file import ROOT, describe, result_path, write_csv
from simplclip.evaluation import BlendResults, ModelResult
from simplclip.plan.actual import runner
from simplclip.plan.cards import GIB
from simplclip.plan.search import Budget, Planner
from simplclip.train import config

BLEND = "blend.json"
DOMAINS = ("new", "old")
REPEATS = 9  # of a step whose time is measured
BASE = [
    "data.train=data/emoji-domains/old-train-*.tar",
    "inherit={source: [efficientnet-lite0, minilm], train: [text.*]}",
    "optim={lr: 1.0e-3, warmup: 30, weight_decay: 0.2}",
    "data.batch_size=128",
    "run.steps=200",
]


class Form(NamedTuple):
    """A way to fine-tune: settings, and learning rates to choose from."""

    settings: list[str]
    rates: tuple[float, ...]


FORMS = {
    "full": Form([], (4e-4, 8e-4, 1.6e-3)),
    "layer decay 0.5": Form(["optim.layer_decay=0.5"], (1.6e-3, 3.2e-3, 6.4e-3)),
    "LoRA, rank 4": Form(["model.lora={rank: 4, alpha: 8}"], (4e-3, 8e-3, 1.6e-2)),
    "LoRA, rank 32": Form(["model.lora={rank: 32, alpha: 64}"], (1e-3, 2e-3, 4e-3)),
}
ZERO_SHOT, BLENDED = "zero-shot", "full"


class Figures(NamedTuple):
    """R@1 of an evaluation in per cent, by split: "new-test", "old-valid" ..."""

    alpha: float
    recalls: dict[str, float]

    def mean(self, part: str) -> float:
        return statistics.fmean(self.recalls[f"{domain}-{part}"] for domain in DOMAINS)


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        "python -m benchmarks.finetune", description=__doc__, formatter_class=raw
    )
    made.add_argument("--out", type=Path, required=True, help="folder for the runs")
    made.add_argument(
        "--config", default=str(Path(__file__).with_suffix(".yaml")), help="what runs share"
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs"
    )
    made.add_argument("--seeds", type=int, default=3, help="at least 2 (default: 3)")
    made.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, which share the CPU's threads"
    )
    made.add_argument(
        "--write", action="store_true", help="write benchmarks/results/finetune-*.csv too"
    )
    return made


class Comparison:
    """The runs of a comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.bases = [run_of(options, BASE, seed) for seed in range(options.seeds)]
        self.rates: dict[str, float] = {}  # by form, once they are chosen

    def run(self, form: str, rate: float, seed: int) -> Run:
        start = json.dumps(str(self.bases[seed].folder / "last.pt"))
        settings = [f"model.checkpoint={start}", f"optim.lr={rate}", *FORMS[form].settings]
        return run_of(self.options, settings, seed)

    def chosen(self, form: str) -> list[Run]:
        """Returns the runs of a form with its chosen rate, by seed."""
        return [self.run(form, self.rates[form], seed) for seed in range(self.options.seeds)]

    def train(self, jobs: Iterable[tuple[str, Run]]) -> None:
        """Trains and evaluates the runs, each with its form, that are not finished.

        A base's checkpoint is kept. Exits with a line for each run that fails.
        """
        threads = max(1, (os.cpu_count() or 1) // self.options.jobs)
        remaining = {job: None for job in jobs if not (job[1].folder / RESULT).exists()}

        def train_one(job: tuple[str, Run]) -> str | None:
            form, run = job
            further = [["--last", "--blend"]] if form == BLENDED else []
            failure = train(
                run, self.options.config, threads, further=further, keep=form == ZERO_SHOT
            )
            print(failure or f"done: {form}, {run.folder}", flush=True)
            return failure

        with ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                failures = [line for line in pool.map(train_one, remaining) if line]
            except KeyboardInterrupt:  # the runs get the same signal and save their last step
                pool.shutdown(cancel_futures=True)
                sys.exit("finetune: interrupted; the same command goes on")
        if failures:
            sys.exit("\n".join(["the same command tries these again:", *failures]))

    def choose(self, form: str) -> None:
        """Chooses the rate of a form by the finished runs of seed 0; of equal ones the lowest."""
        self.rates[form] = max(
            FORMS[form].rates,
            key=lambda rate: figures(self.run(form, rate, 0)).recalls["new-valid"],
        )


def figures(run: Run) -> Figures:
    """Returns the figures of a finished run."""
    result = ModelResult.model_validate_json((run.folder / RESULT).read_text())
    return Figures(1.0, {split: recall(result, split) for split in result.splits})


def blends(run: Run) -> list[Figures]:
    """Returns the figures of the blends of a finished run, by alpha."""
    result = BlendResults.model_validate_json((run.folder / BLEND).read_text())
    rows = []
    for row in result.rows:
        shares = {name: split.first_right.value for name, split in row.splits.items()}
        rows.append(Figures(row.alpha, {name: 100 * share for name, share in shares.items()}))
    return rows


def best_blend(rows: Iterable[Figures]) -> Figures:
    """Returns the figures of the best alpha on the parts valid, of equal ones the lowest."""
    return max(rows, key=lambda row: row.mean("valid"))


def summary(found: Sequence[Figures]) -> dict[str, float]:
    """Returns the mean over seeds of the figures of test, with their 95 % intervals."""
    from scipy import stats  # here, since it takes a second to import

    values = {domain: [row.recalls[f"{domain}-test"] for row in found] for domain in DOMAINS}
    values["both"] = [row.mean("test") for row in found]
    row = {}
    for name, recalls in values.items():
        mean = statistics.fmean(recalls)
        half = stats.t.ppf(0.975, len(recalls) - 1) * statistics.stdev(recalls)
        half /= math.sqrt(len(recalls))
        row |= {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}
    return {name: round(value, 2) for name, value in row.items()}


def costs(runs: Mapping[str, Run], source: str) -> dict[str, dict[str, float]]:
    """Returns what a step of each form takes: parameters that train, predicted MiB, and ms.

    ms: processor time of one thread, the median of interleaved steps on random numbers.
    """
    cpu = torch.device("cpu")
    found: dict[str, dict[str, float]] = {}
    steps = {}
    for form, run in runs.items():
        values = config.load(source, run.settings)
        planner = Planner(values, Budget(24 * GIB), "cpu")
        usage = planner.predict_in_one_graph(values.data.batch_size)
        weights = planner.step.prepared.model.parameters()
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        found[form] = {"trained": trained, "mib": round(usage.peak / 2**20)}
        steps[form] = runner(planner.step, cpu)
    times: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(REPEATS):
        for form, step in steps.items():
            start = time.process_time()
            step()
            times[form].append(1e3 * (time.process_time() - start))
    for form, ms in times.items():
        found[form]["ms"] = round(statistics.median(ms))
    return found


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns the rows of the result file: of the part test, then the tried rates on valid."""
    source, seeds = comparison.options.config, comparison.options.seeds
    rows: list[dict[str, Any]] = []

    def add(form: str, found: Sequence[Figures], **columns: Any) -> None:
        rows.append({"form": form, "part": "test", "seeds": seeds} | columns | summary(found))

    add(ZERO_SHOT, [figures(run) for run in comparison.bases])
    runs = {form: comparison.chosen(form) for form in FORMS}
    cost = costs({form: found[0] for form, found in runs.items()}, source)
    for form, found in runs.items():
        add(form, list(map(figures, found)), lr=comparison.rates[form], **cost[form])
    by_seed = [blends(run) for run in runs[BLENDED]]
    best = [best_blend(found) for found in by_seed]
    alphas = ", ".join(f"{row.alpha:g}" for row in best)
    add(f"best blend of {BLENDED}", best, lr=comparison.rates[BLENDED], alpha=alphas)
    for same_alpha in zip(*by_seed):
        add(f"blends of {BLENDED}", same_alpha, alpha=f"{same_alpha[0].alpha:g}")
    for form, (_, rates) in FORMS.items():
        for rate in rates:
            found = figures(comparison.run(form, rate, 0)).recalls
            tried = {name: round(found[f"{name}-valid"], 2) for name in DOMAINS}
            rows.append({"form": form, "part": "valid", "seeds": 1, "lr": rate} | tried)
    return rows


def build_domains() -> None:
    script = ROOT / "examples" / "emoji" / "domains.py"
    subprocess.run([sys.executable, str(script), "--out", "data/emoji-domains"], check=True)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    comparison = Comparison(options)
    build_domains()
    comparison.train((ZERO_SHOT, run) for run in comparison.bases)
    comparison.train(
        (form, comparison.run(form, rate, 0)) for form in FORMS for rate in FORMS[form].rates
    )
    for form in FORMS:
        comparison.choose(form)
    comparison.train((form, run) for form in FORMS for run in comparison.chosen(form))
    torch.set_num_threads(1)
    rows = rows_of(comparison)
    write_csv(options.out / "finetune.csv", rows)
    where = describe()
    if options.write:
        write_csv(result_path("finetune", where), [row | where for row in rows])


if __name__ == "__main__":
    main()
