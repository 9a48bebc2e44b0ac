"""The trainer: shards -> batches -> two towers -> loss -> AdamW, with stopping and resuming."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip import data, evaluation
from simplclip.common import hardware, ranks
from simplclip.common.errors import UserError
from simplclip.common.files import locked, remove_leftovers
from simplclip.common.progress import duration
from simplclip.models.trained import image_transform, tokenizer
from simplclip.train import checkpoint
from simplclip.train.compilation import Compilation
from simplclip.train.config import Config, ConfigError
from simplclip.train.distributed import wrap
from simplclip.train.log import Log, curves, first_lines
from simplclip.train.setup import State, setup
from simplclip.train.step import TrainingError, keep_frozen, train_step

SAVE_MINUTES = 10.0  # the longest time between two writes of last.pt


class Interrupted(UserError):
    """The end of a run by a signal, after a whole step whose state is saved."""


def run(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains as `config` says, and returns the path of the last checkpoint. data.micro_batch must
    be a number.

    resume: continue from last.pt in the folder, on the CPU bit for bit as if there had been no
    stop. Without a last.pt the
        run prints a note and starts at step 0 (as open_clip's `--resume latest`), so that one
        command starts and resumes.

    Raises:
        ConfigError: the folder already holds a run, or the checkpoint has other settings.
            FileExistsError: another process trains in the folder. A start that fails leaves the
            folder unchanged; after packing it leaves the shards.
        TrainingError: any error once a step is done; that error is the __cause__. The last whole
            step is saved first; if it cannot be saved, the message says why, and which checkpoint
            is intact. Also a loss or gradient that is not finite.
        Interrupted: SIGINT, SIGTERM, SIGHUP, or a closed pipe; the running step is finished and the
            state saved.
        RankError: before a step is done, another rank has ended or does not answer.
    """
    if config.data.micro_batch == "auto":
        raise ConfigError(
            "data.micro_batch: expected a number, got auto, which `simplclip train` replaces by a "
            "number"
        )
    out, began = Path(config.run.out), time.monotonic()
    with ranks.joined(config.run.timeout_minutes), ExitStack() as stack:
        is_first = ranks.first()
        console = (console or Console()) if is_first else Console(quiet=True)
        ranks.on_first(lambda: stack.enter_context(locked(out, "run.out")))
        former = ranks.on_first(partial(checkpoint.former, out, resume))
        device = ranks.agreed(lambda: ranks.device(config.run.device))
        precision, why = hardware.pick_precision(config.run.precision, device)
        section = config.model.model_dump()
        pictures = partial(
            evaluation.load_splits, tokenizer=tokenizer(section), transform=image_transform(section)
        )
        stack.enter_context(timed_algorithms(config.run.cudnn_benchmark and device.type == "cuda"))
        torch.manual_seed(config.run.seed)
        # Before packing, which may take an hour; a run that continues has packed.
        state: Any = None if former else ranks.agreed(lambda: setup(config, device, precision))
        splits = ranks.agreed(lambda: pictures(config.eval.splits)) if config.eval.every else {}
        config, samples, division = ranks.on_first(partial(_with_data, config, former))
        # which a node may lack
        ranks.agreed(lambda: data.sources_of(config.data.train, "data.train"))
        splits |= ranks.agreed(lambda: pictures(config.held_out)) if config.eval.every else {}
        if former:
            state = ranks.agreed(lambda: setup(config, device, precision, former))
        state.config, state.objective.steps = config, config.run.steps
        keep_frozen(state)
        state.wrappers = wrap(state.model)
        if former:
            checkpoint.set_rng_state(former["rng"])
        elif resume:
            state.lines.append(f"resume     {out} has no checkpoint yet: starting at step 0")
        loader = ranks.agreed(lambda: make_loader(state))
        snapshot, log = checkpoint.Snapshot(state, former, samples), Log(state, console)
        stop = stack.enter_context(StopSignals(console))
        try:
            with log.status:
                for line in first_lines(state, why, samples, division):
                    log.print(line)
                # that of the checkpoint's step had failed
                if evaluate_if_due(state, splits, snapshot, log):
                    snapshot.save()
                if state.step < config.run.steps:
                    _train(state, loader, splits, snapshot, stop, log)
            ranks.on_first(partial(curves, out))
        except Exception as error:
            _end(ranks.named(error), snapshot)
            raise
        # inside of StopSignals, where a closed pipe raises nothing
        if state.step == config.run.steps:
            took = duration(time.monotonic() - began)
            log.print(
                f"done       step {state.step} in {took}: {out / 'last.pt'}, {out / 'curves.png'}"
            )
            if snapshot.best:
                recall, step = snapshot.best
                log.print(f"best       mean R@1 {recall:.1%}, of step {step}: {out / 'best.pt'}")
    if state.step < config.run.steps:
        if not is_first:
            raise SystemExit(130)
        saved = f"saved step {state.step} of {config.run.steps} to {out / 'last.pt'}"
        raise Interrupted(f"{stop.reason}: {saved}. {snapshot.go_on}")
    return out / "last.pt"


@contextlib.contextmanager
def timed_algorithms(enabled: bool) -> Iterator[None]:
    """Context in which cuDNN times the algorithms of each convolution once and takes the fastest,
    if `enabled`.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _train(
    state: State, loader: Any, splits: dict[str, Any], snapshot: Any, stop: StopSignals, log: Log
) -> None:
    """Runs the steps until the last one or a stop, and saves the state."""
    config, saved = state.config, time.monotonic()
    compilation = Compilation(state, snapshot, log)
    log.print("data       loading the first batch")
    for batches in steps(state, loader, log):
        log.loaded()
        ranks.seed_apart(config.run.seed + state.step)
        row = compilation.step(partial(train_step, state, batches))
        snapshot.take()
        log.step(row)
        last, stopped = state.step == config.run.steps, stop.agreed()
        evaluate_if_due(state, splits, snapshot, log)
        late = time.monotonic() - saved > 60 * SAVE_MINUTES
        if last or stopped or late or state.step % config.run.save_every == 0:
            snapshot.save()
            saved = time.monotonic()
        if last or stopped:
            if loader.skipped.counts:
                log.print(f"data       {loader.skipped}")
            return
        log.restart_clock()


def steps(state: State, loader: data.Loader, log: Log) -> Iterator[list[dict[str, Any]]]:
    """Yields the micro-batches of each step, one or several, without end."""
    _, count = _micro_batches(state.config)
    batches: list[dict[str, Any]] = []
    reasons = 0
    for batch in loader:
        # copies: a tensor from a loader process holds a file descriptor, and a step may have
        # thousands
        if count > 1:
            batch = {
                k: v if v.is_pinned() else v.clone()
                for k, v in batch.items()
                if isinstance(v, torch.Tensor)
            }
        batches.append(batch)
        if len(batches) < count:
            continue
        state.data = ranks.exchanged(loader.state_dict())
        yield batches
        batches = []
        if reasons != (reasons := len(loader.skipped.counts)):  # the end of the run has all counts
            log.print(f"data       {loader.skipped}")


def _micro_batches(config: Config) -> tuple[int, int]:
    """Returns the images of a rank's micro-batch, and the number of micro-batches of its step."""
    rows, rest = divmod(config.data.batch_size, ranks.count())
    size = min(config.data.images_at_a_time, max(1, rows))
    if rest or rows % size:
        raise ConfigError(
            f"data.batch_size: expected a multiple of {ranks.count()} ranks and of their "
            f"micro-batches of {size}, got {config.data.batch_size}"
        )
    return size, rows // size


def make_loader(state: State) -> data.Loader:
    """Makes this rank's loader, whose batches are micro-batches of a step.

    It continues as `state.data` says, if it can.
    """
    config, c = state.config, state.config.data
    place: dict[str, Any] = {
        "rank": ranks.number(),
        "world_size": ranks.count(),
        "workers": c.workers,
    }
    loader = data.Loader(
        c.train,
        tokenizer=tokenizer(config.model.model_dump()),
        transform=state.transform,
        batch_size=_micro_batches(config)[0],
        captions_per_image=c.captions_per_image,
        teacher=config.loss.needs_teacher,
        sidecars=c.sidecars,
        hold_out=config.eval.hold_out,
        pin_memory=state.device.type == "cuda",
        seed=config.run.seed,
        **place,
        **c.options,
    )
    shards = {"shards_digest": loader.shards_digest}  # which positions of version 0.1.0 lack
    positions = (shards | position for position in state.data or ())
    former = next(
        (position for position in positions if position.items() >= (place | shards).items()), None
    )
    if former:
        loader.seed = former["seed"]
        loader.load_state_dict(former)
    elif state.step:
        loader.seed += state.step
        state.lines.append(
            "resume     ranks, workers or shards were others: the pass over the data starts again"
        )
    return loader


def evaluate_if_due(
    state: State, splits: dict[str, Any], snapshot: checkpoint.Snapshot, log: Log
) -> bool:
    """Evaluates after a step that has an evaluation, once; returns whether it did."""
    every, step = state.config.eval.every, state.step
    if (
        not every
        or snapshot.progress["evaluated"] == step
        or (step % every and step < state.config.run.steps)
    ):
        return False
    evaluate(state, splits, snapshot, log)
    snapshot.progress["evaluated"] = step
    return True


def evaluate(state: State, splits: dict[str, Any], snapshot: checkpoint.Snapshot, log: Log) -> None:
    """Evaluates the model, with the averages of its weights if it has some, on the splits; keeps
    the best one.
    """
    recalls = []
    with state.ema.in_place() if state.ema else nullcontext():
        state.model.eval()
        for name, split in splits.items():
            # as `simplclip evaluate` and the export compute, so that the figures are equal
            towers = evaluation.Towers(state.model, state.device, "fp32")
            evaluation.encode(towers, split, workers=state.config.data.workers)
            retrieval, loss = ranks.on_first(partial(_figures, state, split))
            for direction, figures in retrieval.directions.items() if retrieval else ():
                log.evaluation(name, direction, figures, loss)
                recalls.append(figures["R@1"].value)
            ranks.on_first(partial(log.sheet, name, split))
            if retrieval:
                size = min(len(split), state.config.data.batch_size)
                log.print(f"evaluation {name} loss: {loss:.3f}, in batches of {size}")
        if recalls and snapshot.keep_best(mean := sum(recalls) / len(recalls)):
            log.print(
                f"best       step {state.step}: mean R@1 {mean:.1%}, in {snapshot.out / 'best.pt'}"
            )
        state.model.train()


def _figures(
    state: State, split: evaluation.Split
) -> tuple[evaluation.Retrieval | None, float | None]:
    """Returns R@k and the loss of an encoded split; nothing for one without captions."""
    scale, bias = state.model.logit_scale.detach().exp().cpu(), state.logit_bias
    bias = None if bias is None else bias.detach().cpu()
    loss = evaluation.loss_of(split, state.config.data.batch_size, scale, bias)
    return evaluation.recall_of(split, state.device), loss


def _with_data(
    config: Config, former: dict[str, Any] | None
) -> tuple[Config, int | None, data.Division | None]:
    """Returns `config` with shards in place of tables and folders, which are packed first, and with
    steps for epochs; the samples of an epoch, None if they are not counted; and the counts of what
    eval.hold_out divides.

    Raises ConfigError if the samples are not counted, or if the config cannot continue the run of
    the checkpoint `former`.
    """
    out = Path(config.run.out)
    _micro_batches(config)
    if (
        not former
        and config.inherit.source is None
        and (config.inherit.train or config.inherit.blocks)
    ):
        raise ConfigError(
            "inherit.source: expected weights, for inherit.train and inherit.blocks, got none"
        )
    if not former and config.eval.every and not (config.eval.splits or config.eval.hold_out):
        got = (
            f"for eval.every = {config.eval.every}, got none; eval.hold_out=0.1 holds out a tenth "
            "of data.train"
        )
        raise ConfigError(f"eval.splits: expected held-out data, {got}")
    remove_leftovers(out, checkpoint.WRITTEN.fullmatch)
    config = config.replaced(data={"train": data.packed(config.data.train, out / "shards")})
    if former and config.run.compile == "auto":  # what the run had
        config = config.replaced(run={"compile": former["config"]["run"]["compile"]})
    division = None
    if share := config.eval.hold_out:
        division = data.divided(config.data.train, share, config.data.sidecars)
        if not division.train or not division.held_out:
            got = f"{division.train} that train and {division.held_out} that are held out"
            raise ConfigError(
                "eval.hold_out: expected a share that leaves samples on both sides, got "
                f"{share:g}: {got}"
            )
    samples = config.data.samples or (
        division.train if division else data.dataset_size(config.data.train)
    )
    if config.run.epochs is not None:
        if samples is None:
            expected = "expected the number of samples, for run.epochs, as --set data.samples=855"
            raise ConfigError(f"data.samples: {expected}, got null and no meta.json")
        number = max(1, round(samples * config.run.epochs / config.data.batch_size))
        config = config.replaced(run={"steps": number, "epochs": None})
    if former:
        checkpoint.check_settings(former, config)
    return config, samples, division


def _end(error: Exception, snapshot: checkpoint.Snapshot) -> None:
    """Saves the last whole step, and raises a TrainingError in place of `error`.

    Returns if no step has been done.
    """
    step = snapshot.progress["step"]
    if not ranks.first():
        # The first rank reports a TrainingError; one rank of each node reports the end of another
        # rank.
        silent = isinstance(error, ranks.RankError) and os.environ.get("LOCAL_RANK") != "0"
        if silent or isinstance(error, TrainingError):
            raise SystemExit(1)
        raise TrainingError(f"step {step + 1}: {error}") from error
    saved = snapshot.save_after_error()
    go_on = f" {snapshot.go_on}" if snapshot.saved else ""
    # not finite: continuing from there would give the same error
    if isinstance(error, TrainingError):
        raise TrainingError(f"{error}. {saved}" if saved else str(error)) from error
    # For CPU tensors torch has no class of this error.
    if isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        advice = "Try a smaller data.micro_batch, or auto; `simplclip plan` predicts what fits."
        raise TrainingError(
            f"step {step + 1}: out of memory. {saved or 'Nothing is saved.'} {advice}{go_on}"
        ) from error
    if saved is not None:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = str(error).strip().rstrip(".") or "no message"
        raise TrainingError(f"after step {step}: {kind}{reason}. {saved}{go_on}") from error


class StopSignals:
    """Context in which SIGINT, SIGTERM, SIGHUP or a closed pipe only sets `reason`; a second signal
    ends the process.

    console: the console of the run. If the reader of its output is gone (`| head`), all further
    output is dropped. Outside the main thread Python allows no handlers, so that signals are not
    handled.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.reason: str | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # nohup, and a shell's background job, ignore signals
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handle)
        self.console.on_broken_pipe = self._closed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_) -> None:
        del self.console.on_broken_pipe
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether all ranks stop now, between two steps."""
        stopped = any(ranks.exchanged(self.reason is not None))
        if stopped and self.reason is None:
            self.reason = "signal to another rank"
        return stopped

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a loader process, which the last step needs
            return
        if self.reason and ranks.count() == 1:  # torchrun repeats the signals that it gets
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        # Not print(): a handler may interrupt a print, and Python's buffered files are not
        # reentrant.
        at_once = "; a second signal stops at once" if ranks.count() == 1 else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(
                2,
                f"\n{self.reason}: finishing this step, then saving{at_once}\n".encode()
                * ranks.first(),
            )

    def _closed(self) -> None:
        """Drops all further output. rich calls this instead of raising BrokenPipeError."""
        self.reason = self.reason or "closed pipe"
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.console.file.fileno())
