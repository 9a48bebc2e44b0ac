"""Makes a plan: the step as configured, the largest batches in one graph and by gradient caching, and open_clip's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from simplclip import gradient_cache, models
from simplclip.common import hardware
from simplclip.common.errors import UserError
from simplclip.memory.count import Usage
from simplclip.memory.measure import measure
from simplclip.memory.predict import predict
from simplclip.memory.solve import largest
from simplclip.memory.step import OpenClipStep, TrainerStep
from simplclip.train import config as configs
from simplclip.train.config import Config, ConfigError
from simplclip.train.limits import Budget, gib


class NoCuda(UserError, RuntimeError):
    """torch is a build without CUDA."""


AS_IS, ONE_GRAPH, CACHED = "as configured", "most in one graph", "most by gradient caching"
SMALL_MICRO_BATCH = 256  # if none is configured; a larger one leaves less memory for the loss
MOST_PAIRS = 1 << 22


@dataclass(frozen=True)
class Answer:
    """A batch size and its peak, and those of the next larger one, which does not fit."""

    what: str
    batch_size: int
    micro_batch: int | None
    peak: int
    next_batch_size: int | None = None
    next_peak: int | None = None
    peaks: dict[int, int] = field(default_factory=dict)  # batch size -> peak, for all that were predicted


@dataclass(frozen=True)
class Plan:
    """A plan. Peaks are bytes of torch's allocator; the assumptions of the budget cover other memory."""

    model: str
    precision: str
    device: str
    budget: Budget
    answers: tuple[Answer, ...]
    usage: Usage  # of the step as configured
    measured: int | None  # its peak by two real steps on this machine's GPU
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the step as configured fits."""
        return self.holds(self.answers[0])

    def holds(self, answer: Answer) -> bool:
        return answer.batch_size > 0 and answer.peak <= self.budget.usable


def make(
    config: Config,
    budget: Budget,
    *,
    device: str = "cuda",
    teacher_width: int | None = None,
    compare: bool = False,
    solve: bool = True,
    show: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan of `config` on a device with `budget`.

    config.data.micro_batch "auto" means the result of `micro_batch_that_fits`. teacher_width: D̂ of the stored features, if
    the shards are not on this machine. compare: also predict the original model with open_clip's losses. solve: search the
    largest batches. show: called with a line before each part.

    Raises: ConfigError, ValueError; UncountedOp and UnknownWorkspace if the memory of an op cannot be predicted; NoCuda if
    torch is a build without CUDA.
    """
    where = _device(device)
    precision, why = _precision(config, where)
    notes = [f"precision {precision} ({why})", "two steps; the second has the optimizer's state from its beginning"]
    notes += ["nothing for oneDNN's workspaces inside convolutions"] if where.type == "cpu" else []
    if config.data.micro_batch == "auto":
        show("looking for the micro-batch")
        config = micro_batch_that_fits(config, budget, device=device, teacher_width=teacher_width)

    base = TrainerStep(config, precision, teacher_width)

    def usage_of(data: dict, **changes) -> Usage:
        changed = _changed(config, data=data, **changes)
        step = TrainerStep(changed, precision, teacher_width) if changes else base.resized(changed)
        return predict(step, where)

    cacheable = _cacheable(base.training.model.train())
    show(f"the step as configured: batch {config.data.batch_size:,}")
    usage = usage_of({})
    as_is = Answer(AS_IS, config.data.batch_size, config.data.micro_batch, usage.peak)
    answers, measured = [as_is], None
    if where.type == "cuda" and torch.cuda.is_available():
        show("two real steps of it on this GPU")
        measured = _measured(TrainerStep(config, precision, teacher_width), where)
        notes += [] if measured else ["the step as configured does not fit this machine's GPU"]
    if solve:
        answers += _solved(config, budget, usage_of, cacheable, show)
    if compare:
        answers.append(_of_open_clip(config, budget, precision, base.training.teacher, where, show))
    show("advice")
    advice = tuple(_advice(config, budget, usage, usage_of, cacheable))
    return Plan(config.model.name, precision, device, budget, tuple(answers), usage, measured, advice, tuple(notes))


def micro_batch_that_fits(
    config: Config, budget: Budget, *, device: str = "cuda", teacher_width: int | None = None
) -> Config:
    """`config` with the largest micro-batch, a divisor of the batch, whose step fits; None if the whole batch fits.

    Raises ConfigError if even micro-batches of one image do not fit.
    """
    where, size = _device(device), config.data.batch_size
    precision, _ = _precision(config, where)

    base = TrainerStep(_changed(config, data={"micro_batch": None}), precision, teacher_width)

    def peak(micro: int) -> int:
        changed = _changed(config, data={"micro_batch": None if micro == size else micro})
        return predict(base.resized(changed), where).peak

    divisors = [micro for micro in range(1, size + 1) if size % micro == 0]
    place, seen = largest(lambda index: peak(divisors[index - 1]), budget.usable, start=len(divisors), most=len(divisors))
    if not place:
        raise ConfigError(
            f"data.micro_batch: expected one that fits {gib(budget.usable)} of {gib(budget.memory)}, got auto; a batch of "
            f"{size:,} takes {gib(seen[1])} even with one image at a time"
        )
    micro = divisors[place - 1]
    return _changed(config, data={"micro_batch": None if micro == size else micro})


def _solved(config: Config, budget: Budget, usage_of: Callable, cacheable: bool, show: Callable) -> Iterator[Answer]:
    show("the largest batch in one graph")
    whole = _answer(ONE_GRAPH, lambda n: usage_of({"batch_size": n, "micro_batch": None}).peak, budget, micro_batch=None)
    yield whole
    if not cacheable or not whole.batch_size:
        return
    micro = config.data.micro_batch or min(SMALL_MICRO_BATCH, config.data.batch_size)
    if micro >= whole.batch_size:
        micro = max(1, whole.batch_size // 2)  # the largest micro-batch would leave no memory for a larger batch
    show(f"the largest batch by gradient caching, micro-batches of {micro:,}")

    def cached(count: int) -> int:
        return usage_of({"batch_size": count * micro, "micro_batch": micro}).peak

    yield _answer(CACHED, cached, budget, micro_batch=micro, unit=micro)


def _answer(what: str, peak: Callable[[int], int], budget: Budget, *, micro_batch: int | None, unit: int = 1) -> Answer:
    found, seen = largest(peak, budget.usable, start=max(8, 16384 // unit) if unit > 1 else 32, most=MOST_PAIRS // unit)
    return Answer(
        what,
        found * unit,
        micro_batch,
        seen[found] if found else 0,
        (found + 1) * unit if found + 1 in seen else None,
        seen.get(found + 1),
        {count * unit: bytes_ for count, bytes_ in sorted(seen.items())},
    )


def _of_open_clip(
    config: Config, budget: Budget, precision: str, teacher: Mapping | None, where: torch.device, show: Callable
) -> Answer:
    name = models.original(config.model.name)
    if name is None:
        raise ConfigError(f"--compare: expected a model made from one of open_clip's, got {config.model.name}")
    width = teacher["width"] if "distill_loss" in config.loss.weights else None
    what = f"most in open_clip: {name}, {type(OpenClipStep(name, 1, precision, width).loss).__name__}"
    show(what)
    return _answer(what, lambda n: predict(OpenClipStep(name, n, precision, width), where).peak, budget, micro_batch=None)


def _advice(config: Config, budget: Budget, usage: Usage, usage_of: Callable, cacheable: bool) -> Iterator[str]:
    """Settings that would lower the peak of the step as configured, with the new peak."""

    def gain(change: str, data: dict | None = None, **changes) -> Iterator[str]:
        try:
            less = usage_of(data or {}, **changes)
        except ConfigError:
            return
        if less.peak < 0.99 * usage.peak:
            yield f"{change}: {gib(less.peak)} instead of {gib(usage.peak)}"

    size, micro = config.data.batch_size, config.data.micro_batch
    if not config.model.recompute:
        yield from gain("model.recompute=true (blocks are computed again in backward)", model={"recompute": True})
    if micro is None and size % 4 == 0 and cacheable:
        yield from gain(f"data.micro_batch={size // 4} (gradient caching)", {"micro_batch": size // 4})
    elif micro is not None and micro % 2 == 0:
        yield from gain(f"data.micro_batch={micro // 2}", {"micro_batch": micro // 2})
    if config.loss.scratch_mib > 8:
        yield from gain("loss.scratch_mib=8 (chunks of the similarity matrices)", loss={"scratch_mib": 8})
    if config.inherit.source is None and usage.at_peak.get("activations", 0) > 0.3 * usage.peak:
        yield "inherit.source=... (a frozen prefix of a tower keeps no activations)"
    if usage.peak > budget.usable:
        yield "a smaller data.batch_size, or data.micro_batch=auto"


def _cacheable(model: nn.Module) -> bool:
    """Whether gradient caching supports the model."""
    try:
        gradient_cache.check(model)
    except ValueError:
        return False
    return True


def _measured(step: TrainerStep, device: torch.device) -> int | None:
    try:
        return measure(step, device)
    except torch.OutOfMemoryError:
        return None


def _changed(config: Config, **sections: dict) -> Config:
    """`config` with some values changed, and checked as a whole, unlike in pydantic's model_copy."""
    values = config.to_dict()
    for section, changes in sections.items():
        values[section] |= changes
    return configs.from_dict(values)


def _device(name: str) -> torch.device:
    if name == "cuda" and torch.version.cuda is None:
        raise NoCuda(
            f"device: expected cpu, got cuda: torch {torch.__version__} is a build without CUDA, which plans for a card "
            "need (the card itself is not needed)"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _precision(config: Config, device: torch.device) -> tuple[str, str]:
    """The trainer's precision on the device; a card that is not in this machine has native bf16, as all since Ampere."""
    if device.type == "cuda" and config.run.precision == "auto" and not torch.cuda.is_available():
        return "bf16", "auto: cards since Ampere have native bf16"
    return hardware.pick_precision(config.run.precision, device)
