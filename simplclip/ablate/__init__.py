"""Measures effects: trains a model without and with a change of its settings, several seeds each, and compares.

effects.py      the effects file, and the runs that it needs
worker.py       the process of one run
statistics.py   the paired t-test
tables.py       tables and picture
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from simplclip.ablate import effects as files
from simplclip.ablate import tables
from simplclip.ablate.effects import Effect, Effects, Trial
from simplclip.ablate.worker import RESULT
from simplclip.common.errors import UserError
from simplclip.common.files import locked, write_atomically, write_csv
from simplclip.common.progress import Progress
from simplclip.train import config
from simplclip.train.config import ConfigError


class AblationError(UserError):
    """Some runs failed; the message names their logs."""


def run(
    source: str,
    effects: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    seeds: int = 3,
    jobs: int = 1,
    only: Sequence[str] = (),
    train: bool = True,
) -> Path:
    """Train what the effects file compares with the config `source`, and write the tables; returns OUT/effects.csv.

    The runs of the first effect and all its seeds are done first, then those of the next. A run that several effects share is
    done once. Finished runs are kept in OUT, from which they are found by their settings, so that the file may change; stopped
    ones are continued. The tables are written anew after each run:

        ablation.csv   a row for each run, split and direction: R@1, R@5, R@10 and their chance
        effects.csv    rows for each effect: base, variant, and the paired difference over the seeds that have both
        effects.png    all differences with their 95 % intervals

    Args:
        overrides: settings of every run, after those of the file.
        seeds: of each effect that names no number.
        jobs: runs at a time, which share the CPU's threads.
        only: patterns of names or groups of effects; the others are left out.
        train: False only writes the tables of the runs that are done.

    Raises: ConfigError for settings or an effects file that are not valid, or missing data; FileExistsError if another process
    uses OUT; AblationError after all others are done if runs failed.
    """
    out, found = Path(out), files.load(effects)
    chosen = [e for e in found.effects if not only or any(fnmatchcase(n, p) for p in only for n in (e.name, e.group))]
    if not chosen:
        known = ", ".join(dict.fromkeys(effect.group for effect in found.effects))
        raise ConfigError(f"only: expected patterns of effects or of groups ({known}), got {', '.join(only)}")
    if train and (missing := list(files.needed(found, chosen))):
        raise ConfigError("\n".join(missing))
    numbers = {effect.name: effect.seeds or found.seeds or seeds for effect in chosen}
    plan = [
        (effect, [files.trials(found, effect, seed, source, overrides) for seed in range(numbers[effect.name])])
        for effect in chosen
    ]
    out.mkdir(parents=True, exist_ok=True)
    title = f"{source}: what each setting changes"
    if train:
        with locked(out, f"out: expected a folder that no other ablation uses, got {out}"):
            _train_all(plan, source, out, jobs, title)
    return report(plan, out, title)


Plan = Sequence[tuple[Effect, list[dict[str, Trial]]]]


def _train_all(plan: Plan, source: str, out: Path, jobs: int, title: str) -> None:
    trials: dict[str, Trial] = {}
    for _, pairs in plan:
        for trial in (trial for pair in pairs for side in pair.values() for trial in (*side.prepared.values(), side)):
            trials.setdefault(trial.digest, trial)
    todo = [trial for trial in trials.values() if not (trial.folder(out) / RESULT).exists()]
    finished = len(trials) - len(todo)
    print(f"{len(plan)} effects, {len(trials)} runs, {finished} of them done", flush=True)
    failed: list[str] = []
    running: list[subprocess.Popen[Any]] = []
    threads, lock, ended = (
        max(1, (os.cpu_count() or 1) // jobs),
        threading.Lock(),
        {t.digest: threading.Event() for t in todo},
    )
    with ThreadPoolExecutor(jobs) as pool, Progress("runs", len(trials), finished, unit="runs") as bar:

        def one(trial: Trial) -> None:
            try:
                for before in trial.prepared.values():  # they are earlier in the queue
                    if before.digest in ended:
                        ended[before.digest].wait()
                if log := _train(trial, source, out, threads, running):
                    failed.append(log)
            finally:
                ended[trial.digest].set()
            with lock:
                report(plan, out, title)
                bar.update()

        waiting = [pool.submit(one, trial) for trial in todo]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # saves its last whole step
            raise
    if failed:
        raise AblationError(
            f"{len(failed)} of {len(todo)} runs failed; to try them again, repeat the command:\n" + "\n".join(failed)
        )


def _train(trial: Trial, source: str, out: Path, threads: int, running: list[subprocess.Popen[Any]]) -> str | None:
    """Returns a line that names the log of a run that failed."""
    folder = trial.folder(out)
    settings, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    write_atomically(settings, config.load(source, trial.overrides(out)).to_yaml())
    command = [sys.executable, "-m", "simplclip.ablate.worker", str(settings), *(["--keep"] if trial.keep else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "SIMPLCLIP_THREADS": str(threads)}
    with open(log, "a") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    running.append(process)
    code = process.wait()
    running.remove(process)
    return f"the run {folder.name} ended with {code}: see {log}" if code else None


def report(plan: Plan, out: Path, title: str) -> Path:
    """Write the tables and the picture of what is done."""
    results: dict[str, dict[str, Any]] = {}
    for trial in (trial for _, pairs in plan for pair in pairs for trial in pair.values()):
        path = trial.folder(out) / RESULT
        if trial.digest not in results and path.exists():
            results[trial.digest] = json.loads(path.read_text()) | {"run": path.parent.name, "seed": trial.seed}
    runs = [row for result in results.values() for row in tables.run_rows(result["run"], result["seed"], result)]
    rows: list[dict[str, Any]] = []
    for effect, pairs in plan:
        done = [pair for pair in pairs if all(trial.digest in results for trial in pair.values())]
        found = [{side: results[trial.digest] for side, trial in pair.items()} for pair in done]
        rows += tables.effect_rows(effect.group, effect.name, found) if found else ()
    if rows:
        write_csv(out / "ablation.csv", list(runs[0]), runs)
        write_csv(out / "effects.csv", list(rows[0]), rows)
        tables.draw(out / "effects.png", rows, title)
    return out / "effects.csv"


__all__ = ["AblationError", "Effect", "Effects", "Trial", "report", "run"]
