"""The evaluations of a run: when they are due, and their figures, sheets and best weights; and the
signals that end a run, or an evaluation, after a whole step.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

from simplclip import evaluation
from simplclip.common import ranks
from simplclip.common.errors import UserError
from simplclip.data import HeldOut
from simplclip.data.samples import digest_of
from simplclip.models.trained import image_transform, tokenizer
from simplclip.train.checkpoint import Snapshot
from simplclip.train.config import Config
from simplclip.train.log import Log
from simplclip.train.setup import State


class Interrupted(UserError):
    """The end of a run by a signal, after a whole step whose state is saved."""


class Stopped(Exception):
    """An evaluation that gives way to a signal."""


class StopSignals:
    """Context in which a signal only sets `reason`; Ctrl-C after it ends all.

    Outside the main thread Python allows no handlers for SIGINT, SIGTERM and SIGHUP.
    """

    def __init__(self) -> None:
        """Sets no handlers yet; entering the context does."""
        self.reason: str | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # nohup, and a shell's background job, ignore signals
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agree_to_stop(self) -> bool:
        """Whether any rank has noted a stop; sets `reason` on all. All have to call it."""
        stopped = any(ranks.all_gather(self.reason is not None))
        if stopped and self.reason is None:
            self.reason = "signal to another rank"
        return stopped

    def check(self) -> None:
        """Raises Stopped if a stop is noted. Several ranks, which would wait, go on."""
        if self.reason is not None and ranks.count() == 1:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal in `reason` and, on the first rank, says so on the standard error."""
        if os.getpid() != self._process:  # a loader process, which the last step needs
            return
        several = ranks.count() > 1  # torchrun repeats the signals that it gets
        if self.reason and not several:
            # one event may send the others twice: a closed terminal, `timeout`
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.reason = signal.Signals(number).name
        if not ranks.first():
            return
        message = f"\n{self.reason}: finishing this step, then saving"
        if not several:
            message += "; Ctrl-C then stops at once"
        # Not print(): a handler may interrupt a print, and Python's buffered files are not
        # reentrant.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"{message}\n".encode())


@dataclass
class _Encoder(evaluation.Encoder):
    """An encoder that gives way to a signal before each batch, by `Stopped`."""

    stop: StopSignals = field(kw_only=True)

    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Returns features as the base class does."""
        self.stop.check()
        return super().features(tower, inputs)


def load_splits(config: Config, splits: dict[str, Any]) -> dict[str, HeldOut]:
    """Returns held-out data of `data.held_out` by name; {} if the run does not evaluate."""
    if not config.eval.every:
        return {}
    return evaluation.load_splits(splits, image_transform(config.model.model_dump()))


def is_due(state: State, snapshot: Snapshot) -> bool:
    """Whether the last step has an evaluation that is not finished."""
    every, step = state.config.eval.every, state.step
    if not every or snapshot.progress["evaluated"] == step:
        return False
    return step % every == 0 or step == state.config.run.steps


def evaluate(
    state: State,
    splits: dict[str, HeldOut],
    snapshot: Snapshot,
    stop: StopSignals,
    log: Log,
) -> bool:
    """Evaluates the model on the splits after a step; returns whether all ranks stop now.

    last.pt is written before, since an evaluation may take long, and again with what it found. A
    signal ends it after the running batch, so that it stays due. All ranks have to call it.
    """
    snapshot.save()
    with suppress(Stopped):
        try:
            _evaluate(state, splits, snapshot, stop, log)
        finally:
            state.model.train()
        snapshot.progress["evaluated"] = state.step
        snapshot.save()
    # A figure of matplotlib is thousands of objects in cycles. Python alone would let those of many
    # evaluations pile up, since it waits until they are a quarter of all objects.
    gc.collect()
    return stop.agree_to_stop()


def _evaluate(
    state: State,
    splits: dict[str, HeldOut],
    snapshot: Snapshot,
    stop: StopSignals,
    log: Log,
) -> None:
    """Prints and writes the figures of the splits, and the weights if they are the best."""
    recalls, digests = [], []
    # as `simplclip evaluate` and the export compute, so that the figures are equal
    section = state.config.model.model_dump()
    encoder = _Encoder(
        name="checkpoint",
        model=state.model,
        preprocess=image_transform(section),
        tokenizer=tokenizer(section),
        device=state.device,
        precision="fp32",
        stop=stop,
    )
    with state.ema.in_place() if state.ema else nullcontext():
        state.model.eval()
        for name, held in splits.items():
            index = evaluation.encode(encoder, held, workers=state.config.data.workers)
            log.print_skipped(name, index)
            loss = ranks.on_first(_loss, state, index)
            retrieval = ranks.on_first(index.retrieval, state.device)
            if retrieval and loss is not None:
                digests.append([name, ranks.on_first(index.digest)])
                for direction, figures in retrieval.items():
                    log.write_evaluation(name, direction, figures, loss)
                    recalls.append(figures["R@1"]["value"])
            ranks.on_first(log.write_sheet, name, index)
            if loss is not None:
                size = min(len(index), state.config.data.batch_size)
                log.print(f"evaluation {name} loss: {loss:.3f}, in batches of {size}")
        if recalls:
            mean, former = sum(recalls) / len(recalls), snapshot.best
            samples = digest_of(digests)
            if former and former["samples"] != samples:
                log.print(
                    f"best       other held-out samples than those of step {former['step']}, whose "
                    f"mean R@1 of {former['recall']:.1%} counts no more"
                )
            if snapshot.keep_best(mean, samples):
                best = snapshot.out / "best.pt"
                log.print(f"best       step {state.step}: mean R@1 {mean:.1%}, in {best}")
        ranks.on_first(log.write_curves)


def _loss(state: State, index: evaluation.Index) -> float | None:
    """Returns the loss of a split; None for one without captions."""
    scale, bias = state.model.logit_scale.detach().exp().cpu(), state.logit_bias
    if bias is not None:
        bias = bias.detach().cpu()
    return index.loss(state.config.data.batch_size, scale, bias)
