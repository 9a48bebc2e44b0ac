"""The trainer: shards -> batches -> two towers -> loss -> AdamW, with stopping and resuming."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip import data
from simplclip.common import generators, hardware, ranks
from simplclip.common.errors import InputError, UserError
from simplclip.common.files import check_writable, locked
from simplclip.common.progress import duration
from simplclip.data.samples import digest_of
from simplclip.data.shards import Source
from simplclip.data.sidecars import sidecars_of
from simplclip.models.trained import tokenizer
from simplclip.models.weights import checksums
from simplclip.train import checkpoint
from simplclip.train.checkpoint import Snapshot
from simplclip.train.config import Config, ConfigError
from simplclip.train.evaluate import (
    Interrupted,
    StopSignals,
    evaluate,
    is_due,
    load_splits,
)
from simplclip.train.log import Log, first_lines, lines_on_captions
from simplclip.train.objective import wrap
from simplclip.train.resolve import Resolved, resolve
from simplclip.train.setup import State, load_model, make_state
from simplclip.train.step import Batch, TrainingError, keep_frozen, train_step

SAVE_MINUTES = 10.0  # the longest time between two writes of last.pt


def run(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Path:
    """Trains as `config` says, and returns the path of the last checkpoint.

    What the config leaves open is resolved first, see resolve.py.

    resume: continue from last.pt in the folder, on the CPU bit for bit as if there had been no
    stop. Without a last.pt the run prints a note and starts at step 0 (as open_clip's `--resume
    latest`), so that one command starts and resumes.

    Settings that differ from the checkpoint's are named in the log.

    Raises:
        ConfigError: the folder already holds a run, or the checkpoint cannot take a setting.
        FileExistsError: another process trains in the folder. A start that fails leaves the folder
            unchanged; after packing it leaves the shards.
        TrainingError: any error once a step is done; that error is the __cause__. The last whole
            step is saved first; if it cannot be saved, the message says why, and which checkpoint
            is intact. Also a loss or gradient that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP; the running step is finished and the state saved.
        InputError: a rank has another config, or other data or frozen weights, than the first one.
        RankError: before a step is done, another rank has ended or does not answer.
    """
    out, began = Path(config.run.out), time.monotonic()
    console = console or Console()
    with ranks.join(config.run.timeout_minutes), ExitStack() as stack:
        if not ranks.first():
            console = Console(quiet=True)
        if ranks.first():
            check_writable(out, "run.out")
            stack.enter_context(locked(out, "run.out"))
        former = ranks.on_first(checkpoint.read_last, out, resume)
        device = ranks.set_device(config.run.device)
        precision, why_precision = hardware.pick_precision(config.run.precision, device)
        timed = config.run.cudnn_benchmark and device.type == "cuda"
        stack.enter_context(hardware.timed_algorithms(timed))
        torch.manual_seed(config.run.seed)
        state, splits, resolved = _start(config, former, device, precision, console)
        if former:
            generators.restore(former["rng"])
        elif resume:
            state.lines.append(f"resume     {out} has no checkpoint yet: starting at step 0")
        loader = make_loader(state)
        _check_alike(state, loader, splits)

        snapshot, log = Snapshot(state, former, resolved.samples), Log(state, console)
        stop = stack.enter_context(StopSignals())
        try:
            with log.status:
                for line in first_lines(state, why_precision, resolved):
                    log.print(line)
                _train(state, loader, splits, snapshot, stop, log)
            ranks.on_first(log.write_curves)
        except Exception as error:
            error = ranks.as_rank_error(error)
            _raise_saved(error, snapshot)
            raise error from None
        finished = state.step == state.config.run.steps and not is_due(state, snapshot)
        if finished:
            _print_end(snapshot, log, time.monotonic() - began)
    if not finished:
        steps = state.config.run.steps
        saved = f"saved step {state.step} of {steps} to {out / 'last.pt'}"
        raise Interrupted(f"{stop.reason}: {saved}. {snapshot.go_on}")
    return out / "last.pt"


def _start(
    config: Config,
    former: dict[str, Any] | None,
    device: torch.device,
    precision: str,
    console: Console,
) -> tuple[State, dict[str, data.HeldOut], Resolved]:
    """Makes a run's state, its resolved config, and its held-out data by name."""
    # before packing, which may take an hour
    loaded = load_model(config, former)
    splits = load_splits(config, config.eval.splits)
    resolved: Resolved = ranks.on_first(resolve, config, former, console)
    config = resolved.config
    splits |= load_splits(config, config.held_out)
    changes = [*checkpoint.changed_settings(former, config)] if former else []
    state = make_state(config, device, precision, former, loaded=loaded)
    state.lines += changes
    if former and former["config"]["eval"]["hold_out"] != config.eval.hold_out:
        state.data = None
    keep_frozen(state)
    state.wrappers = wrap(state.model)
    return state, splits, resolved


def _check_alike(state: State, loader: data.Loader, splits: dict[str, data.HeldOut]) -> None:
    """Raises InputError on all ranks if one has another config, data or frozen weights.

    Nodes have files of their own. Data are compared by names and sizes of their files, configs but
    for run.out, where only the first rank writes.
    """
    if ranks.count() == 1:
        return
    settings = state.config.to_dict()
    del settings["run"]["out"]
    frozen = {name: p for name, p in state.model.named_parameters() if not p.requires_grad}
    sidecars = [sidecars_of(source.url, loader.sidecars) for source in loader.sources]
    parts = {
        "config": settings,
        "data.train": _sizes(loader.sources),
        "data.sidecars": [[os.path.getsize(path) for path in paths] for paths in sidecars],
        "eval.splits": {name: _sizes(split.sources) for name, split in splits.items()},
        "inherit.source, model.checkpoint": checksums(frozen),
    }
    gathered = ranks.all_gather({name: digest_of([part]) for name, part in parts.items()})
    for name, digest in gathered[0].items():
        if any(other[name] != digest for other in gathered):
            raise InputError(f"{name}: expected that of the first rank on all, got several")


def _sizes(sources: Iterable[Source]) -> list[tuple[str, int | None]]:
    """Returns the name of each source, and its bytes if it is a file."""
    return [
        (source.name, os.path.getsize(source.url) if os.path.isfile(source.url) else None)
        for source in sources
    ]


def _train(
    state: State,
    loader: data.Loader,
    splits: dict[str, data.HeldOut],
    snapshot: Snapshot,
    stop: StopSignals,
    log: Log,
) -> None:
    """Runs the steps until the last one or a stop; logs, evaluates and writes last.pt when due."""
    config = state.config
    # an evaluation at the checkpoint's step had failed, or gave way to a signal
    if is_due(state, snapshot) and evaluate(state, splits, snapshot, stop, log):
        return
    if state.step == config.run.steps:
        return
    log.print("data       loading the first batch")
    for batches in load_micro_batches(state, loader, log):
        log.end_loading()
        ranks.seed_apart(config.run.seed + state.step)
        row = train_step(state, batches)
        snapshot.take()
        log.write_step(row)
        stopped, last = stop.agree_to_stop(), state.step == config.run.steps
        if is_due(state, snapshot) and not stopped:
            stopped = evaluate(state, splits, snapshot, stop, log)
        late = time.monotonic() - snapshot.saved_at > 60 * SAVE_MINUTES
        if stopped or last or late or state.step % config.run.save_every == 0:
            snapshot.save()
        if stopped or last:
            if loader.skipped.counts:
                log.print(f"data       {loader.skipped}")
            return
        log.restart_clock()


def _print_end(snapshot: Snapshot, log: Log, seconds: float) -> None:
    """Prints what a run that has taken `seconds` leaves."""
    out, took = snapshot.out, duration(seconds)
    log.print(
        f"done       step {snapshot.saved} in {took}: {out / 'last.pt'}, {out / 'curves.png'}"
    )
    best = snapshot.best
    if best:
        recall, step = best["recall"], best["step"]
        log.print(f"best       mean R@1 {recall:.1%}, of step {step}: {out / 'best.pt'}")


def load_micro_batches(state: State, loader: data.Loader, log: Log) -> Iterator[list[Batch]]:
    """Yields the micro-batches of each step, without end; sets `state.data` before each."""
    _, count = _micro_batch_size_and_count(state.config)
    batches: list[Batch] = []
    reported = 0  # reasons for which samples are left out
    for number, batch in enumerate(loader):
        if not number:
            for line in lines_on_captions(batch, loader.tokenizer):
                log.print(line)
        batches.append(_copied(batch) if count > 1 else batch)
        if len(batches) < count:
            continue
        state.data = ranks.all_gather(loader.state_dict())
        yield batches
        batches = []
        reasons = len(loader.skipped.counts)
        if reasons != reported:  # the end of the run has all counts
            reported = reasons
            log.print(f"data       {loader.skipped}")


def _copied(batch: Batch) -> Batch:
    """Returns the tensors of a batch, copied unless they are pinned."""
    # a tensor from a loader process holds a file descriptor, and a step may have thousands
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {name: t if t.is_pinned() else t.clone() for name, t in tensors.items()}


def _micro_batch_size_and_count(config: Config) -> tuple[int, int]:
    """Returns the images of a rank's micro-batch, and their number; raises ConfigError."""
    rows, rest = divmod(config.data.batch_size, ranks.count())
    size = min(config.data.images_at_a_time, max(1, rows))
    if rest or rows % size:
        raise ConfigError(
            f"data.batch_size: expected a multiple of {ranks.count()} ranks and of their "
            f"micro-batches of {size}, got {config.data.batch_size}"
        )
    return size, rows // size


def make_loader(state: State) -> data.Loader:
    """Makes this rank's loader of micro-batches, which continues as `state.data` says.

    If ranks, workers, shards or eval.hold_out were others, it starts a new pass; `state.lines` says
    so.
    """
    config, section = state.config, state.config.data
    size, count = _micro_batch_size_and_count(config)
    loader = data.Loader(
        section.train,
        tokenizer=tokenizer(config.model.model_dump()),
        transform=state.transform,
        batch_size=size,
        batches_per_step=count,
        workers=section.workers,
        captions_per_image=section.captions_per_image,
        teacher=config.loss.needs_teacher,
        sidecars=section.sidecars,
        hold_out=config.eval.hold_out,
        pin_memory=state.device.type == "cuda",
        seed=config.run.seed,
        rank=ranks.number(),
        world_size=ranks.count(),
        **section.options,
    )
    for position in state.data or ():
        loader.seed = position["seed"]
        with suppress(InputError):
            loader.load_state_dict(position)
            return loader
    loader.seed = config.run.seed
    if state.step:
        loader.seed += state.step
        state.lines.append(
            "resume     ranks, workers, shards or eval.hold_out were others: the epoch starts again"
        )
    return loader


def _raise_saved(error: Exception, snapshot: Snapshot) -> None:
    """Saves the last whole step, and raises a TrainingError that says so, unless there is none."""
    step = snapshot.progress["step"]
    saved = snapshot.save_after_error()
    go_on = f" {snapshot.go_on}" if snapshot.saved else ""
    # not finite: continuing from there would give the same error
    if isinstance(error, TrainingError):
        raise TrainingError(f"{error}. {saved}" if saved else str(error)) from error
    if _is_out_of_memory(error):
        advice = "Try a smaller data.micro_batch, or auto; `simplclip plan` predicts what fits."
        raise TrainingError(
            f"step {step + 1}: out of memory. {saved or 'Nothing is saved.'} {advice}{go_on}"
        ) from error
    if saved:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = str(error).strip().rstrip(".") or "no message"
        raise TrainingError(f"after step {step}: {kind}{reason}. {saved}{go_on}") from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, on a GPU or a CPU."""
    # For CPU tensors torch has no class of this error.
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))
