"""The trainer: shards -> batches -> two towers -> loss -> AdamW, with everything needed to stop and to go on.

run              sets up, restores, loops, finishes
_batches         the endless stream of batches, epoch after epoch, micro-batches of a step together
train_step       one step: forward, backward, update
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from simplclip import backends, checkpoint, data, evaluate, gradient_cache, hardware, models, plots
from simplclip.cards import gib
from simplclip.config import Config, ConfigError, differences, from_dict
from simplclip.nn import SimplifiedBlock
from simplclip.train.memory import MemoryLimit, ran_out
from simplclip.train.metrics import Reporter, RunLog, Speed, peak_memory_mb
from simplclip.train.signals import StopRequest
from simplclip.train.training import Training

MAX_LOGIT_SCALE = math.log(100)  # as open_clip

# What may differ when a run goes on from a checkpoint: it does not change what is computed. Of data.train, the folder may.
_FREE = (
    "data.micro_batch",
    "loss.scratch_mib",
    "model.recompute",
    "eval.",
    "run.out",
    "run.steps",
    "run.device",
    "run.threads",
    "run.log_every",
    "run.print_every",
    "run.save_every",
    "run.keep",
    "run.tensorboard",
)


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


class Interrupted(Exception):
    """A signal ended the run after a whole step; its state is saved."""


def run(config: Config, *, resume: bool = False, console: Console | None = None, memory_limit: int | None = None) -> Path:
    """Train as `config` says; returns the path of the last checkpoint.

    memory_limit: bytes that the process is capped at, as `memory.MemoryLimit` says.

    The folder config.run.out gets config.yaml, metrics.csv (and evaluation.csv), tensorboard/, last.pt, numbered
    checkpoints and curves.png. resume: go on from last.pt there, on the CPU bit for bit as if there had been no stop.
    Without a last.pt it says so and starts (as open_clip's `--resume latest`), so that one command serves both.

    Errors: ConfigError (a folder that holds a run already; a checkpoint of other settings), TrainingError (a loss or
    gradient that is not finite; out of memory, with what would fit), Interrupted (SIGINT or SIGTERM: the running step ends
    and the state is saved).
    """
    console = console or Console()
    out = Path(config.run.out)
    state, config = _claim(out, config, resume)
    device = hardware.pick_device(config.run.device)
    limit = MemoryLimit(device, memory_limit)
    precision, why = hardware.pick_precision(config.run.precision, device)
    threads = hardware.set_threads(config.run.threads)
    auto = config.data.micro_batch == "auto"
    if auto:
        config = limit.settle(config)
    _seed(config.run.seed)

    loader = _loader(config, pin_memory=device.type == "cuda")
    splits = evaluate.load_splits(config.eval.splits, config)[0] if config.eval.every else {}
    this = Training(config, device, precision, state)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(out / "config.yaml", config.to_yaml())

    with ExitStack() as stack:
        stack.callback(limit.lift)
        stop = stack.enter_context(StopRequest())
        report = stack.enter_context(Reporter(console, config.run.steps, this.step, config.run.print_every))
        log = stack.enter_context(RunLog(out, this.step, config.run.tensorboard))
        report.print(models.summary(this.model, config.model.name))
        for line in this.inheritance.lines() if this.inheritance else ():
            report.print(line)
        report.print(f"loss       {_loss(this)}; similarity_loss is served by {_backend(this, 'similarity_loss_fwd')}")
        report.print(f"blocks     {_blocks(this)}")
        report.print(f"precision  {precision} ({why})")
        report.print(f"device     {device}; CPU threads: {threads}; loader processes: {config.data.workers}")
        if auto:
            micro = config.data.micro_batch
            told = f"{micro:,} images at a time" if micro else "the whole batch at a time"
            report.print(f"memory     {told} fit in {gib(limit.budget.usable)}, by simplclip plan")
        if resume and not state:
            report.print(f"resume     {out} holds no checkpoint yet: starting at step 0")
        elif state:
            before = state["config"]["run"]["steps"]
            longer = "" if before == config.run.steps else f"; the learning rate now ends at {config.run.steps}, not {before}"
            report.print(f"resume     going on from step {this.step}{longer}")
        this.model.train()
        speed = Speed()
        out_of_memory = False
        stream = _batches(this, loader, report.print) if this.step < config.run.steps else ()
        for batches in stream:
            try:
                row = train_step(this, batches)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                out_of_memory = True
                break
            row |= {"samples_per_s": speed.step(config.data.batch_size), "peak_mb": peak_memory_mb(device)}
            report.step(this.step, row)
            last = this.step == config.run.steps
            if last or this.step % config.run.log_every == 0:
                log.write("metrics", row)
            if splits and (last or this.step % config.eval.every == 0):
                _evaluate(this, splits, log, report.print)
                speed.pause()
            if last or stop.requested or this.step % config.run.save_every == 0:
                checkpoint.save(out, this.state(), config.run.keep)
                speed.pause()
            if last or stop.requested:
                report.print(f"data       epoch {this.epoch} so far: {loader.report()}")
                break

    plots.curves(out)
    if out_of_memory:
        step = this.step + 1
        del this, batches
        saved = f"The last checkpoint in {out} is intact" if (out / "last.pt").exists() else "No checkpoint was written yet"
        raise TrainingError(
            f"step {step}: out of memory. {saved}. {limit.advice(config)} "
            f"To go on: simplclip train {out / 'config.yaml'} --resume --set KEY=VALUE"
        )
    if this.step < config.run.steps:
        raise Interrupted(
            f"{stop.requested}: saved step {this.step} of {config.run.steps} to {out / 'last.pt'}. "
            f"To go on: simplclip train {out / 'config.yaml'} --resume"
        )
    report.print(f"done       step {this.step}: {out / 'last.pt'}, {out / 'curves.png'}")
    return out / "last.pt"


def train_step(this: Training, batches: list[dict[str, Any]]) -> dict[str, float]:
    model, optimizer, scaler = this.model, this.optimizer, this.scaler
    optimizer.zero_grad(set_to_none=True)
    if this.config.data.micro_batch is None:
        terms = this.terms(batches, *this.encode(*batches))
        scaler.scale(sum(terms.values())).backward()
    else:
        losses = partial(this.terms, batches)
        terms = gradient_cache.backward(this.encode, batches, losses, model=model, scaler=scaler)
    loss = sum(terms.values())
    scaler.unscale_(optimizer)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, this.config.optim.grad_clip or math.inf)

    # One wait for the device per step, before the update: a bad step leaves the parameters as they were.
    figures = {"loss": loss, **terms, "logit_scale": model.logit_scale.exp(), "grad_norm": norm}
    values = dict(zip(figures, torch.stack([v.detach().float().reshape(()) for v in figures.values()]).tolist()))
    # An infinite gradient is the scaler's business: it skips the step and lowers its scale.
    watched = [k for k in values if k != "grad_norm" or not scaler.is_enabled()]
    if not all(math.isfinite(values[k]) for k in watched):
        raise TrainingError(
            f"step {this.step + 1}: not finite: {', '.join(f'{k}={values[k]:g}' for k in watched)}; stopped "
            f"before the update. The last checkpoint in {this.config.run.out} is intact. Try a lower "
            f"optim.lr, a longer optim.warmup or run.precision=fp32"
        )
    lr = optimizer.param_groups[0]["lr"]
    scaler.step(optimizer)
    scaler.update()
    this.schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    this.step += 1
    return {"step": this.step, "epoch": this.epoch, **values, "lr": lr}


def _batches(this: Training, loader: data.Loader, tell: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    """The batches of each step from where `this` stands, without end: one, or as many micro-batches as make the batch.

    A step may take micro-batches of two epochs. The loader draws nothing from the global random generators.
    """
    c, told, batches = this.config.data, None, []
    wanted = c.batch_size // (c.micro_batch or c.batch_size)
    while True:
        for batch in loader.epoch(this.epoch, skip_batches=this.batch):
            this.batch += 1
            if wanted > 1:
                batch = {name: _own(value) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            batches.append(batch)
            if len(batches) == wanted:
                yield batches
                batches = []
        if told != (news := loader.report()):  # the same news every epoch is no news
            told = news
            tell(f"data       epoch {this.epoch}: {news}")
        this.epoch, this.batch = this.epoch + 1, 0


def _own(value: Tensor) -> Tensor:
    """A copy: what a loader's process hands over holds a file descriptor, and a step may have thousands of micro-batches."""
    return value if value.is_pinned() else value.clone()


def _evaluate(this: Training, splits: dict[str, evaluate.Split], log: RunLog, tell: Callable[[str], None]) -> None:
    this.model.eval()
    for name, split in splits.items():
        evaluate.encode(this.model, split, this.config.eval.batch_size, this.device, this.precision)
        for direction, figures in evaluate.retrieval(split).items():
            values = {k: v["value"] for k, v in figures.items()}
            log.write("evaluation", {"step": this.step, "split": name, "direction": direction, **values})
            shown = "  ".join(f"{k} {v['value']:.1%} ({v['chance']:.1%})" for k, v in figures.items())
            tell(f"evaluation {name} {direction.replace('_', ' ')}: {shown}")
    this.model.train()


def _claim(out: Path, config: Config, resume: bool) -> tuple[dict[str, Any] | None, Config]:
    """Read the checkpoint that is to go on, or see that the run's folder is free. Never overwrites another run.

    The config comes back with the checkpoint's micro-batch where it leaves that to us.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.out: expected a folder, came the file {out}")
    last = out / "last.pt"
    if resume and last.exists():
        state = checkpoint.load(last)
        was = from_dict(state["config"])
        if config.data.micro_batch == "auto":
            config = config.model_copy(update={"data": config.data.model_copy(update={"micro_batch": was.data.micro_batch})})
        _check_same(state, config, last)
        state["batch"] = _place(state["batch"], was, config, last)
        return state, config
    if not resume and any((out / name).exists() for name in ("last.pt", "config.yaml", "metrics.csv")):
        raise ConfigError(
            f"run.out: {out} already holds a run; go on with it by --resume, or choose another folder by --set run.out=FOLDER"
        )
    return None, config


def _place(batch: int, was: Config, config: Config, last: Path) -> int:
    """Batches of the epoch that are done, counted in those of `config`."""
    before, now = (c.data.micro_batch or c.data.batch_size for c in (was, config))
    done, rest = divmod(batch * before, now)
    if rest:
        raise ConfigError(
            f"data.micro_batch: expected a divisor of the {batch * before:,} images that {last} has seen of its epoch, "
            f"came {now}"
        )
    return done


def _check_same(state: dict[str, Any], config: Config, last: Path) -> None:
    changed = differences(from_dict(state["config"]).to_dict(), config.to_dict())
    if "data.train" in changed:
        names = [[Path(p).name for p in ([v] if isinstance(v, str) else v)] for v in changed["data.train"]]
        if names[0] == names[1]:
            del changed["data.train"]
    changed = {k: v for k, v in changed.items() if not k.startswith(_FREE)}
    if changed:
        told = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
        raise ConfigError(f"resume: {last} was trained with other settings: {told}")
    if state["step"] > config.run.steps:
        raise ConfigError(f"run.steps: expected at least {state['step']}, the step of {last}, came {config.run.steps}")


def _loader(config: Config, pin_memory: bool) -> data.Loader:
    c, m = config.data, config.model
    return data.make_loader(
        c.train,
        tokenizer=models.tokenizer(m.name),
        transform=models.transforms(m.name, train=True, augment=c.augment, image_size=m.image_size),
        batch_size=c.micro_batch or c.batch_size,
        captions_per_image=c.captions_per_image,
        teacher=config.loss.needs_teacher,
        workers=c.workers,
        seed=config.run.seed,
        pin_memory=pin_memory,
        **c.options,
    )


def _loss(this: Training) -> str:
    weights = ", ".join(term.removesuffix("_loss").replace("_", " ") for term in this.objective.schedules)
    if this.teacher is None:
        return f"{type(this.loss).__name__}: {weights}"
    stored = (
        f"features of {this.teacher['name']}, {this.teacher['width']} wide, come from the shards; no teacher is in memory"
    )
    return f"{type(this.loss).__name__}: {weights}; {stored}"


def _backend(this: Training, op: str, **call) -> str:
    dtype = hardware.DTYPES[this.precision] or torch.float32
    return backends.select(op, this.device.type, dtype, backends.forced(), **call)[0]


def _blocks(this: Training) -> str:
    """How many simplified blocks the model has, and what serves their parts."""
    found = [module for module in this.model.modules() if isinstance(module, SimplifiedBlock)]
    if not found:
        return "none of simplclip's"
    attention = {_backend(this, "shaped_attention_fwd", width=block.width // block.heads) for block in found}
    mlp = _backend(this, "parallel_mlp_fwd")
    return f"{len(found)} simplified; shaped_attention is served by {' and '.join(sorted(attention))}, parallel_mlp by {mlp}"


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global generator, which other people's transforms draw from)
