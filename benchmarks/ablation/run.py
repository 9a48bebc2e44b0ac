"""Does the runs that an effects file needs, and writes tables of their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.ablation import effects as files
from benchmarks.ablation import tables
from benchmarks.ablation.effects import RESULT, Effect, Trial
from simplclip.common.errors import UserError
from simplclip.common.files import differences, locked, write_atomically, write_csv
from simplclip.common.progress import Progress
from simplclip.train import config
from simplclip.train.config import ConfigError

Plan = Sequence[tuple[Effect, list[dict[str, Trial]]]]  # each effect with its runs by seed, "base" and "variant"


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
    """Trains the models that an effects file compares with config `source`, and writes tables. Returns OUT/effects.csv.

    The runs of the first effect with all its seeds are done first, then those of the next. A run that several effects share
    is done once. Finished runs are kept in OUT, where they are found by their settings, so that the file may change; stopped
    runs are continued. A run that fails does not stop the others. The tables are written anew after each run:

        ablation.csv   a row for each run, split and direction: R@1, R@5, R@10 and their chance
        effects.csv    rows for each effect: base, variant, and the paired difference over the seeds that have both
        effects.png    all differences with their 95 % intervals

    Args:
        overrides: settings of every run, after those of the file.
        seeds: of each effect if the file names no number.
        jobs: runs at a time, which share the CPU's threads.
        only: patterns of names or groups of effects; the others are left out.
        train: False only writes the tables of the finished runs.

    Raises:
        ConfigError: a setting or the effects file is not valid, data are missing, or a default has changed since a run.
        FileExistsError: another process uses OUT.
        AblationError: runs failed; raised when all others are done.
    """
    out, found = Path(out), files.load(effects)
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    chosen = [e for e in found.effects if not only or any(fnmatchcase(n, p) for p in only for n in (e.name, e.group))]
    if not chosen:
        groups = ", ".join(dict.fromkeys(effect.group for effect in found.effects))
        raise ConfigError(f"only: expected patterns of effects or of groups ({groups}), got {', '.join(only)}")
    if train and (missing := list(files.missing(found, chosen))):
        raise ConfigError("\n".join(missing))
    plan = [
        (e, [files.trials(found, e, seed, source, overrides) for seed in range(e.seeds or found.seeds or seeds)])
        for e in chosen
    ]
    for trial in {trial.digest: trial for trial in _all(plan)}.values():
        _check_defaults(trial, source, out)
    title = f"{source}: what each setting changes"
    if not train:
        return report(plan, out, title)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"out: expected a folder that no other process uses, got {out}: another ablation runs in it"):
        failed = _train_all(plan, source, out, jobs, title)
    path = report(plan, out, title)
    if failed:
        raise AblationError("\n".join([f"{len(failed)} runs failed; the same command tries them again", *failed]))
    return path


def _train_all(plan: Plan, source: str, out: Path, jobs: int, title: str) -> list[str]:
    """Does all unfinished runs. Returns a line for each run that failed."""
    trials: dict[str, Trial] = {}
    for trial in _all(plan):
        if trial.digest not in trials or trial.keep:
            trials[trial.digest] = trial
    todo = [trial for trial in trials.values() if not _done(trial, out)]
    print(f"{len(plan)} effects, {len(trials)} runs, {len(trials) - len(todo)} of them done", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[subprocess.Popen[bytes]] = []
    ends: dict[str, Future[str | None]] = {}
    reporting = threading.Lock()

    def one(trial: Trial) -> str | None:
        for name, before in trial.prepared.items():  # unfinished prepared runs are earlier in the queue
            if before.digest in ends and ends[before.digest].result():
                return f"{trial.name} was not started: the run of {name} failed"
        failure = _train(trial, source, out, threads, running)
        with reporting:
            report(plan, out, title)
        return failure

    with ThreadPoolExecutor(jobs) as pool, Progress("runs", len(trials), len(trials) - len(todo), unit="runs") as bar:
        try:
            for trial in todo:
                ends[trial.digest] = pool.submit(one, trial)
                ends[trial.digest].add_done_callback(lambda _: bar.update())
            return [failure for end in ends.values() if (failure := end.result())]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()  # the process saves its last whole step
            raise


def _all(plan: Plan) -> Iterator[Trial]:
    """Yields all runs in their order; a run that another run needs comes before it."""
    for trial in (trial for _, pairs in plan for pair in pairs for trial in pair.values()):
        yield from trial.prepared.values()
        yield trial


def _check_defaults(trial: Trial, source: str, out: Path) -> None:
    """Raises ConfigError if a default has changed since an earlier run, since digests do not contain defaults."""
    earlier = (folder := trial.folder(out)).with_name(f"{folder.name}.yaml")
    if folder.exists() and earlier.exists():
        changed = differences(*(c.to_dict() for c in (config.load(earlier), config.load(source, trial.overrides(out)))))
        changed.pop("run.out", None)
        if changed:
            changes = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
            raise ConfigError(
                f"out: expected runs of the present defaults, got {folder}: {changes}. Delete it to do it again"
            )


def _done(trial: Trial, out: Path) -> bool:
    folder = trial.folder(out)
    return (folder / RESULT).exists() and (not trial.keep or (folder / "last.pt").exists())


def _train(trial: Trial, source: str, out: Path, threads: int, running: list[subprocess.Popen[bytes]]) -> str | None:
    """Does one run in a process of its own. Returns a line that names its log if the run fails, else None."""
    folder = trial.folder(out)
    settings, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    write_atomically(settings, config.load(source, trial.overrides(out)).to_yaml())
    worker = [sys.executable, "-m", "benchmarks.ablation.worker", str(settings), str(os.getpid())]
    command = [*worker, *(["--keep"] if trial.keep else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as file:
        # In a session of its own: a run that gets Ctrl-C from the terminal and from here as well would stop without saving.
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    running.append(process)
    code = process.wait()
    running.remove(process)
    return f"{folder.name} ended with {code}: see {log}" if code else None


def report(plan: Plan, out: Path, title: str) -> Path:
    """Writes the tables and the picture of the finished runs of `plan`. Returns OUT/effects.csv."""
    results = {}
    for trial in _all(plan):
        path = trial.folder(out) / RESULT
        if trial.digest not in results and path.exists():
            results[trial.digest] = json.loads(path.read_text()) | {"run": path.parent.name, "seed": trial.seed}
    rows = []
    for effect, pairs in plan:
        done = [pair for pair in pairs if all(trial.digest in results for trial in pair.values())]
        found = [{side: results[trial.digest] for side, trial in pair.items()} for pair in done]
        rows += tables.effect_rows(effect.group, effect.name, found) if found else ()
    if rows:
        runs = [row for result in results.values() for row in tables.run_rows(result)]
        write_csv(out / "ablation.csv", list(runs[0]), runs)
        write_csv(out / "effects.csv", list(rows[0]), rows)
        tables.draw(out / "effects.png", rows, title)
    return out / "effects.csv"
