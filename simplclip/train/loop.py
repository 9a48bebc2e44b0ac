"""The trainer: shards -> batches -> two towers -> loss -> AdamW, with stopping and resuming."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from simplclip import data, models, retrieval
from simplclip.common import hardware
from simplclip.common.errors import UserError
from simplclip.models.inherit import TRAINS
from simplclip.ops import backends
from simplclip.train import checkpoint
from simplclip.train.folder import claim, run_lock
from simplclip.train.limits import MemoryLimit, gib, ran_out
from simplclip.train.metrics import Reporter, RunLog, curves, peak_memory_mb
from simplclip.train.prefix_cache import PrefixCache
from simplclip.train.rescue import LastStep, StopRequest
from simplclip.train.settings import Config
from simplclip.train.state import Training
from simplclip.train.step import TrainingError, train_step
from simplclip.train.trust import flag


class Interrupted(UserError):
    """A signal ended the run after a whole step, whose state is saved."""


def run(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    memory_limit: int | None = None,
    planner: ModuleType | None = None,
) -> Path:
    """Train as `config` says; returns the path of the last checkpoint.

    memory_limit: most bytes of the process, see `limits.MemoryLimit`.
    planner: a module that predicts the memory of a step, e.g. `simplclip.memory`; data.micro_batch "auto" needs one.
    resume: continue from last.pt in the folder, on the CPU bit for bit as if there had been no stop. Without a last.pt the
        run prints a note and starts at step 0 (as open_clip's `--resume latest`), so that one command serves both.

    The folder config.run.out gets config.yaml, metrics.csv (and evaluation.csv), last.pt and curves.png, all after
    the first whole step.

    Raises:
        ConfigError: the folder already holds a run or another process trains in it, or the checkpoint has other settings. A
            start that fails leaves the folder unchanged.
        TrainingError: any error after a step is done, which is its cause. The last whole step is saved first; otherwise the
            message says why not, and which checkpoint is intact. Also a loss or gradient that is not finite, and out of
            memory, with advice on what would fit.
        Interrupted: SIGINT or SIGTERM; the running step is finished and the state saved.
    """
    out = Path(config.run.out)
    with ExitStack() as stack:
        note = stack.enter_context(run_lock(out))
        state, config = claim(out, config, resume)
        checkpoint.remove_temporaries(out)
        device = hardware.pick_device(config.run.device)
        precision, why = hardware.pick_precision(config.run.precision, device)
        limit = MemoryLimit(device, memory_limit, planner)
        stack.callback(limit.lift)
        auto = config.data.micro_batch == "auto"
        if auto:
            config = limit.settle(config)
        torch.manual_seed(config.run.seed)
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)  # noqa: NPY002 (transforms may draw from the global generator)

        splits = {}
        if config.eval.every:
            splits = retrieval.load_splits(config.eval.splits, config.model.name, config.model.image_size)
        this = Training(config, device, precision, state)
        console = console or Console()
        if this.prefix:
            PrefixCache(this).make(partial(console.print, markup=False, highlight=False, soft_wrap=True))
        loader = _loader(this, pin_memory=device.type == "cuda")
        this.model.train()
        whole = LastStep(this)
        stop = stack.enter_context(StopRequest())
        try:
            report = Reporter(console, config.run.steps, this.step, config.run.print_every)
            with report.progress, RunLog(out, this.step) as log:
                report.print(models.summary(this.model, config.model.name))
                for line in this.inheritance.lines() if this.inheritance else ():
                    report.print(line)
                sigmoid = config.loss.base == "sigmoid"
                similarity = _backend(this, "similarity_sigmoid" if sigmoid else "similarity_loss_fwd")
                report.print(f"loss       {_loss(this)}; similarity_loss is served by {similarity}")
                if sigmoid:
                    report.print(f"logits     {_logits(this)}")
                report.print(f"blocks     {_blocks(this)}")
                for line in this.folded.lines():
                    report.print(f"frozen     {line}")
                report.print(f"precision  {precision} ({why})")
                report.print(
                    f"device     {device}; CPU threads: {torch.get_num_threads()}; loader processes: {config.data.workers}"
                )
                if note:
                    report.print(f"lock       {note}")
                if auto:
                    micro = config.data.micro_batch
                    part = f"{micro:,} images at a time" if micro else "the whole batch at a time"
                    report.print(f"memory     {part} fit in {gib(limit.budget.usable)}, by simplclip plan")
                if resume and not state:
                    report.print(f"resume     {out} has no checkpoint yet: starting at step 0")
                elif state:
                    before, now = state["config"]["run"]["steps"], config.run.steps
                    longer = "" if before == now else f"; the learning rate now ends at {now}, not {before}"
                    report.print(f"resume     continuing from step {this.step}{longer}")
                if this.step < config.run.steps:
                    _steps(this, loader, splits, whole, stop, report, log)
            curves(out)
        except Exception as error:
            failed = _failure(error, whole, limit, config)
            if failed is error:
                raise
            raise failed from error
    if this.step < config.run.steps:
        raise Interrupted(
            f"{stop.requested}: saved step {this.step} of {config.run.steps} to {out / 'last.pt'}. "
            f"To go on: simplclip train {out / 'config.yaml'} --resume{flag(config)}"
        )
    report.print(f"done       step {this.step}: {out / 'last.pt'}, {out / 'curves.png'}")
    return out / "last.pt"


def _steps(
    this: Training,
    loader: data.Loader,
    splits: dict[str, retrieval.Split],
    whole: LastStep,
    stop: StopRequest,
    report: Reporter,
    log: RunLog,
) -> None:
    """Run the steps until the last one or a stop, and save the state."""
    c, seconds, waiting, began = this.config.run, 0.0, 0.0, time.perf_counter()
    for batches in _batches(this, loader, report.print):
        waited = time.perf_counter() - began
        row = train_step(this, batches)
        whole.take()
        took, began = time.perf_counter() - began, time.perf_counter()
        share = 0.05 if seconds else 1.0  # smoothed over about the last 20 steps
        seconds, waiting = seconds + share * (took - seconds), waiting + share * (waited - waiting)
        row |= {"samples_per_s": this.config.data.batch_size / seconds, "data_share": waiting / seconds}
        row |= {"peak_mb": peak_memory_mb(this.device)}
        report.step(this.step, row)
        last = this.step == c.steps
        if last or this.step % c.log_every == 0:
            log.write("metrics", row)
        if splits and (last or this.step % this.config.eval.every == 0):
            _evaluate(this, splits, log, report.print)
            began = time.perf_counter()  # evaluations and checkpoints do not count
        if last or stop.requested or this.step % c.save_every == 0:
            whole.save()
            began = time.perf_counter()
        if last or stop.requested:
            report.print(f"data       epoch {this.epoch} so far: {loader.report()}")
            return


def _failure(error: Exception, whole: LastStep, limit: MemoryLimit, config: Config) -> Exception:
    """Save the last whole step; return the error that `run` raises for an error of its steps."""
    out, step = Path(config.run.out), whole.this.step + 1
    full = ran_out(error)
    if full:
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        limit.lift()
    saved = whole.rescue()
    again = f"simplclip train {out / 'config.yaml'} --resume{flag(config)}"
    go_on = f" To go on: {again}" if (out / "last.pt").exists() else ""
    if full:
        where = saved or "No step was finished before it, so nothing is saved."
        change = f"{go_on} --set KEY=VALUE" if go_on else " To try again: the same command with --set KEY=VALUE"
        try:
            advice = limit.advice(config)
        except Exception as problem:  # of the planner, which must not hide the first one
            advice = f"simplclip plan has no advice: {problem}."
        return TrainingError(f"step {step}: out of memory. {where} {advice}{change}")
    if saved is None:
        return error
    if isinstance(error, TrainingError):  # not finite: continuing from there would give the same error
        return TrainingError(f"{error}. {saved}")
    message = str(error).strip().rstrip(".") or "no message"
    return TrainingError(f"after step {step - 1}: {type(error).__name__}: {message}. {saved}{go_on}")


def _batches(this: Training, loader: data.Loader, show: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    """Yields the micro-batches of each step, one or several, from the position of `this` on, without end.

    A step may take micro-batches of two epochs. The loader draws nothing from the global random generators.
    """
    c, last, batches, restarts = this.config.data, None, [], 0
    wanted = c.batch_size // c.images_at_a_time
    while True:
        for batch in loader.epoch(this.epoch, this.batch, this.data):
            this.batch += 1
            for restart in loader.restarts[restarts:]:
                restarts += 1
                show(f"data       {restart}")
            if wanted > 1:  # copies: a tensor from a loader process holds a file descriptor, and a step may have thousands
                batch = {k: v if v.is_pinned() else v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}
            batches.append(batch)
            if len(batches) == wanted:
                this.data = loader.state()
                yield batches
                batches = []
        if last != (report := loader.report()):  # only reports that differ from the last one
            last = report
            show(f"data       epoch {this.epoch}: {report}")
        this.epoch, this.batch = this.epoch + 1, 0


def _evaluate(this: Training, splits: dict[str, retrieval.Split], log: RunLog, show: Callable[[str], None]) -> None:
    this.model.eval()
    for name, split in splits.items():
        c = this.config
        retrieval.encode(this.model, split, c.eval.batch_size, this.device, this.precision, workers=c.data.workers)
        for direction, figures in (retrieval.recall_of(split, this.device) or {}).items():
            values = {k: v["value"] for k, v in figures.items()}
            log.write("evaluation", {"step": this.step, "split": name, "direction": direction, **values})
            shown = "  ".join(f"{k} {v['value']:.1%} ({v['chance']:.1%})" for k, v in figures.items())
            show(f"evaluation {name} {direction.replace('_', ' ')}: {shown}")
    this.model.train()


def _loader(this: Training, pin_memory: bool) -> data.Loader:
    config, c = this.config, this.config.data
    fields = {"sidecars": c.sidecars, "max_pixels": c.max_pixels, "max_bytes": c.max_bytes, "on_error": c.on_error}
    if this.prefix:
        fields |= {"sidecars": [*c.sidecars, c.cache_prefix], "prefix": this.prefix.shape}
    return data.make_loader(
        data.parts_of(c.pairs, "data.train"),
        tokenizer=models.tokenizer(config.model.name),
        transform=this.transform,
        batch_size=c.images_at_a_time,
        captions_per_image=c.captions_per_image,
        teacher=config.loss.needs_teacher,
        workers=c.workers,
        seed=config.run.seed,
        pin_memory=pin_memory,
        **fields | c.options,
    )


def _loss(this: Training) -> str:
    weights = ", ".join(term.removesuffix("_loss").replace("_", " ") for term in this.config.loss.weights)
    if this.teacher is None:
        return f"{type(this.loss).__name__}: {weights}"
    views = f" of {this.teacher['views']['number']} views of each image" if "views" in this.teacher else ""
    stored = f"features of {this.teacher['name']}, {this.teacher['width']} wide,{views} are read from the data"
    return f"{type(this.loss).__name__}: {weights}; {stored}; no teacher is in memory"


def _logits(this: Training) -> str:
    """The scale and the bias that the run starts with, and where they are from."""
    rows = this.inheritance.rows if this.inheritance else ()
    inherited = {row.module for row in rows if row.status == TRAINS}

    def source(name: str) -> str:
        if this.step:
            return "from the checkpoint"
        if f"init_{name}" in this.config.model.options:
            return f"model.options.init_{name}"
        return "inherited" if {"", name} & inherited else "as in SigLIP"

    bias = "no bias" if this.logit_bias is None else f"bias {this.logit_bias.item():.4g}"
    scale = f"scale {this.model.logit_scale.exp().item():.4g}"
    return f"{scale} ({source('logit_scale')}), {bias} ({source('logit_bias')})"


def _backend(this: Training, op: str, **call) -> str:
    dtype = hardware.DTYPES[this.precision] or torch.float32
    return backends.select(op, this.device.type, dtype, backends.forced(), **call)[0]


def _blocks(this: Training) -> str:
    """The number of simplified blocks of the model, and the backends that run their parts."""
    if not this.blocks:
        return "none simplified"
    attention = sorted({_backend(this, "shaped_attention_fwd", width=b.width // b.heads) for b in this.blocks})
    mlp = _backend(this, "parallel_mlp_fwd")
    return f"{len(this.blocks)} simplified; shaped_attention is served by {' and '.join(attention)}, parallel_mlp by {mlp}"
