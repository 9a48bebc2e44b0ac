"""The trainer: shards -> batches -> two towers -> loss -> AdamW, with stopping and resuming."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from rich.console import Console

from simplclip import data, evaluation
from simplclip.common import hardware, ranks
from simplclip.common.errors import UserError
from simplclip.common.files import remove_leftovers
from simplclip.common.progress import duration
from simplclip.train import announce, checkpoint
from simplclip.train.batches import batches, loader, with_steps
from simplclip.train.folder import claim, run_lock
from simplclip.train.limits import MemoryLimit, gib, ran_out
from simplclip.train.metrics import Reporter, RunLog, curves
from simplclip.train.prefix_cache import PrefixCache
from simplclip.train.rescue import LastStep, StopRequest
from simplclip.train.settings import Config
from simplclip.train.state import Training, image_transform, tokenizer
from simplclip.train.step import TrainingError, train_step
from simplclip.train.trust import flag

SAVE_MINUTES = 10.0  # the longest time between two writes of last.pt


class Interrupted(UserError):
    """The end of a run by a signal, after a whole step whose state is saved."""


def run(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    memory_limit: int | None = None,
    planner: ModuleType | None = None,
) -> Path:
    """Trains as `config` says, and returns the path of the last checkpoint.

    memory_limit: the most bytes that the process may use, see `limits.MemoryLimit`.
    planner: a module that predicts the memory of a step, e.g. `simplclip.memory`; data.micro_batch "auto" needs one.
    resume: continue from last.pt in the folder, on the CPU bit for bit as if there had been no stop. Without a last.pt the
        run prints a note and starts at step 0 (as open_clip's `--resume latest`), so that one command starts and resumes.

    The files in the folder config.run.out, except for its lock, are written after the first whole step.

    Raises:
        ConfigError: the folder already holds a run or another process trains in it, or the checkpoint has other settings. A
            start that fails leaves the folder unchanged.
        TrainingError: any error once a step is done; that error is the __cause__. The last whole step is saved first; if it
            cannot be saved, the message says why, and which checkpoint is intact. Also a loss or gradient that is not finite,
            and out of memory, with advice on settings that would fit.
        Interrupted: SIGINT, SIGTERM, SIGHUP, or an output that nobody reads any more; the running step is finished and the
            state saved.
    """
    out, began = Path(config.run.out), time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(ranks.joined())
        is_first = ranks.first()
        config = ranks.on_first(partial(with_steps, config))
        note = ranks.on_first(lambda: stack.enter_context(run_lock(out)))
        state, config = ranks.on_first(partial(claim, out, config, resume))
        if is_first:
            remove_leftovers(out, checkpoint.WRITTEN.fullmatch)
        device = ranks.device(config.run.device)
        precision, why = hardware.pick_precision(config.run.precision, device)
        limit = MemoryLimit(device, memory_limit, planner)
        stack.callback(limit.lift)
        auto = config.data.micro_batch == "auto"
        if auto:
            config = ranks.on_first(partial(limit.with_micro_batch, config))
        torch.manual_seed(config.run.seed)
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)  # noqa: NPY002 (transforms may draw from the global generator)

        splits = {}
        if config.eval.every:
            splits = evaluation.load_splits(config.eval.splits, tokenizer(config), image_transform(config, train=False))
        training = Training(config, device, precision, state)
        ranks.seed_apart(config.run.seed + training.step)
        console = (console or Console()) if is_first else Console(quiet=True)
        if training.prefix:
            show = partial(console.print, markup=False, highlight=False, soft_wrap=True)
            ranks.on_first(lambda: PrefixCache(training).make(show))
        source = loader(training)
        training.model.train()
        whole = LastStep(training)
        stop = stack.enter_context(StopRequest(console))
        try:
            report, log = Reporter(console, config.run, device), RunLog(out, training.step)
            with report.status:
                for line in announce.lines(training, why, source):
                    report.print(line)
                if note:
                    report.print(f"lock       {note}")
                if auto:
                    fits = f"fits in {gib(limit.budget.usable)}, by simplclip plan"
                    report.print(f"memory     data.micro_batch = {config.data.micro_batch or 'null'} {fits}")
                if resume and not state:
                    report.print(f"resume     {out} has no checkpoint yet: starting at step 0")
                elif state:
                    before, now = state["config"]["run"]["steps"], config.run.steps
                    longer = "" if before == now else f"; the learning rate now ends at {now}, not {before}"
                    report.print(f"resume     continuing from step {training.step}{longer}{ranks.before(state)}")
                if training.step < config.run.steps:
                    _steps(training, source, splits, whole, stop, report, log)
            ranks.on_first(partial(curves, out))
        except Exception as error:
            failed = _failure(error, whole, limit, config)
            if failed is error:
                raise
            raise failed from error
        if training.step == config.run.steps:  # inside of StopRequest, where a closed pipe raises nothing
            took = duration(time.monotonic() - began)
            report.print(f"done       step {training.step} in {took}: {out / 'last.pt'}, {out / 'curves.png'}")
    if training.step < config.run.steps:
        if not is_first:
            raise SystemExit(130)
        raise Interrupted(
            f"{stop.requested}: saved step {training.step} of {config.run.steps} to {out / 'last.pt'}. "
            f"To go on: simplclip train {out / 'config.yaml'} --resume{flag(config)}"
        )
    return out / "last.pt"


def _steps(
    training: Training,
    source: data.Loader,
    splits: dict[str, evaluation.Split],
    whole: LastStep,
    stop: StopRequest,
    report: Reporter,
    log: RunLog,
) -> None:
    """Runs the steps until the last one or a stop, and saves the state."""
    settings, every = training.config.run, training.config.eval.every
    seconds, waiting, began, saved = 0.0, 0.0, time.perf_counter(), time.monotonic()
    for of_step in batches(training, source, report.print):
        waited = time.perf_counter() - began
        announced = partial(announce.first_terms, training, report.print) if training.step == 0 else None
        row = train_step(training, of_step, announced)
        whole.take()
        took, began = time.perf_counter() - began, time.perf_counter()
        share = 0.05 if seconds else 1.0  # smoothed over about the last 20 steps
        seconds, waiting = seconds + share * (took - seconds), waiting + share * (waited - waiting)
        row |= {"samples_per_s": training.config.data.batch_size / seconds, "data_share": waiting / seconds}
        row |= {"peak_mb": hardware.peak_memory_mb(training.device)}
        report.step(training.step, row, seconds * (settings.steps - training.step))
        last = training.step == settings.steps
        if last or training.step % settings.log_every == 0:
            log.write("metrics", row)
        stopped = stop.agreed()  # raises if another rank died; this step is then saved, and is in the log already
        if every and (last or training.step % every == 0):
            with training.average.in_place() if training.average else nullcontext():
                _evaluate(training, splits, log, report.print)
            began = time.perf_counter()  # evaluations and checkpoints do not count
        minutes = (time.monotonic() - saved) / 60
        if last or stopped or training.step % settings.save_every == 0 or minutes >= SAVE_MINUTES:
            whole.save()
            began, saved = time.perf_counter(), time.monotonic()
        if last or stopped:
            report.print(f"data       epoch {training.epoch} so far: {source.report()}")
            return


def _failure(error: Exception, whole: LastStep, limit: MemoryLimit, config: Config) -> BaseException:
    """Saves the last whole step, and returns the error that `run` raises in place of `error`."""
    out, step = Path(config.run.out), whole.training.step + 1
    full = ran_out(error)
    if full:
        traceback.clear_frames(error.__traceback__)  # the frames hold the step's activations
        limit.lift()
    if not ranks.first():
        return SystemExit(1) if isinstance(error, TrainingError) else TrainingError(f"step {step}: {ranks.error_line(error)}")
    saved = whole.rescue()
    again = f"simplclip train {out / 'config.yaml'} --resume{flag(config)}"
    go_on = f" To go on: {again}" if (out / "last.pt").exists() else ""
    if full:
        where = saved or "No step was finished before it, so nothing is saved."
        change = f"{go_on} --set KEY=VALUE" if go_on else " To try again: the same command with --set KEY=VALUE"
        try:
            advice = limit.advice(config)
        except Exception as problem:  # an error of the planner must not hide the first error
            advice = f"simplclip plan has no advice: {problem}."
        return TrainingError(f"step {step}: out of memory. {where} {advice}{change}")
    if saved is None:
        return error
    if isinstance(error, TrainingError):  # not finite: continuing from there would give the same error
        return TrainingError(f"{error}. {saved}")
    return TrainingError(f"after step {step - 1}: {ranks.error_line(error)}. {saved}{go_on}")


def _evaluate(training: Training, splits: dict[str, evaluation.Split], log: RunLog, show: Callable[[str], None]) -> None:
    training.model.eval()
    for name, split in splits.items():
        config = training.config
        where = training.device, training.precision
        evaluation.encode(training.model, split, evaluation.BATCH_SIZE, *where, workers=config.data.workers)
        found = ranks.on_first(partial(evaluation.recall_of, split, training.device))
        for direction, figures in (found or {}).items():
            values = {k: v["value"] for k, v in figures.items()}
            log.write("evaluation", {"step": training.step, "split": name, "direction": direction, **values})
            shown = "  ".join(f"{k} {v['value']:.1%} ({v['chance']:.1%})" for k, v in figures.items())
            show(f"evaluation {name} {direction.replace('_', ' ')}: {shown}")
    training.model.train()
