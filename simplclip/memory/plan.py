"""Makes a plan: the step as configured, the largest batches in one graph and by gradient caching, and open_clip's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from simplclip import gradient_cache, models
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.memory.count import Usage
from simplclip.memory.exchange import Exchange
from simplclip.memory.measure import measure, predict
from simplclip.memory.step import OpenClipStep, TrainerStep
from simplclip.models.trained import SIGLIP
from simplclip.ops.similarity.chunks import SCRATCH_BYTES, SCRATCH_BYTES_ELSEWHERE, STORE_BYTES
from simplclip.train import config as configs
from simplclip.train.config import ConfigError
from simplclip.train.limits import Budget, gib
from simplclip.train.settings import Config, MicroBatch

SMALL_MICRO_BATCH = 256  # if none is configured; a larger micro-batch leaves less memory for the loss
MOST_PAIRS = 1 << 22
# GiB of memory of cards, from their data sheets.
CARDS = {"rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32, "rtx-3060": 12, "a100-40": 40, "a100-80": 80, "h100": 80}


def parse_memory(text: str) -> int:
    """Returns the bytes of a size such as "24GiB", or of a card in `CARDS`. Raises InputError.

    "24GB" means "24GiB": the memory of cards is counted in powers of two, though vendors write GB.
    """
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    for card in (name, f"rtx-{name}"):
        if card in CARDS:
            return CARDS[card] << 30
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])I?B", text.strip().upper())
    if not match or not float(match[1]):
        raise InputError(f"memory: expected a size such as 24GiB or one of {', '.join(CARDS)}, got {text!r}")
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])


@dataclass(frozen=True)
class Answer:
    """A batch size and its peak memory; and the next larger batch size, which does not fit, with its peak."""

    what: str
    batch_size: int
    micro_batch: int | dict[str, int | None] | None  # as in the config
    peak: int
    fits: bool
    next_batch_size: int | None = None
    next_peak: int | None = None
    peaks: dict[int, int] = field(default_factory=dict)  # batch size -> peak, for all that were predicted


@dataclass(frozen=True)
class Plan:
    """A plan. Sizes are bytes of torch's allocator; the assumptions cover other memory."""

    model: str
    precision: str
    device: str
    memory: int
    usable: int
    answers: list[Answer]  # the first one is the step as configured
    usage: Usage  # of the step as configured
    measured: int | None  # peak of two real steps as configured, on this machine's GPU
    assumptions: list[str]
    advice: list[str]
    ranks: int  # number of ranks; the figures above are for one rank
    exchange: dict[str, Any]  # see `_Planner.exchange`; empty for one rank


def make(
    config: Config,
    budget: Budget,
    *,
    device: str = "cuda",
    teacher_width: int | None = None,
    compare: bool = False,
    solve: bool = True,
    ranks: int = 1,
    rate: float | None = None,
) -> Plan:
    """Makes the plan of `config` on a device with `budget`.

    config.data.micro_batch "auto" means the result of `micro_batch_that_fits`. teacher_width: D̂ of the stored features, if
    the shards are not on this machine. compare: also predict the original model with open_clip's losses. solve: search the
    largest batches. ranks: the number of ranks; the plan is for one rank, with its share of data.batch_size. rate: pairs that
    a rank computes in a second, to which the time of the exchange is compared.

    Raises: ConfigError; InputError if torch is a build without CUDA; UncountedOp if the memory of an op cannot be predicted.
    """
    if config.run.steps is None:  # memory does not depend on steps, and the data to count may be elsewhere
        config = config.model_copy(update={"run": config.run.model_copy(update={"steps": 1 << 30, "epochs": None})})
    if compare and ranks > 1:
        raise InputError(f"--compare: expected one rank, got {ranks}")
    this = _Planner(config, budget, device, teacher_width, ranks)
    config = this.config
    if config.data.micro_batch == "auto":
        this.config = config = this.with_micro_batch()
    on_card = this.device.type == "cuda"
    kept = "" if on_card else f", and {STORE_BYTES >> 20} MiB of their rows kept for backward where that saves a product"
    assumptions = [
        f"{budget.context >> 20} MiB for the context of the driver and of torch's libraries",
        f"{budget.libraries >> 20} MiB for workspaces inside cuBLAS and cuDNN, which no op states",
        f"{budget.fragmentation:.0%} of the rest lost to the allocator's fragmentation",
        f"precision {this.precision} ({this.why})",
        f"in the loss, chunks of {(SCRATCH_BYTES_ELSEWHERE if on_card else SCRATCH_BYTES) >> 20} MiB{kept}",
        "two steps; the second has the optimizer's state from its beginning",
        *([] if on_card else ["nothing for what oneDNN takes inside convolutions and products of bfloat16"]),
        *this.base.assumed,
        *([f"one of {ranks} ranks, with {config.data.batch_size} of the pairs, and buckets of DDP"] if ranks > 1 else []),
    ]
    usage, measured = this.usage(), None
    micro = config.to_dict()["data"]["micro_batch"]
    answers = [Answer("as configured", config.data.batch_size, micro, usage.peak, usage.peak <= budget.usable)]
    exchange = this.exchange(rate) if ranks > 1 else {}
    if on_card and torch.cuda.is_available() and ranks == 1:
        try:
            measured = measure(TrainerStep(config, this.precision, teacher_width), this.device)
        except torch.OutOfMemoryError:
            assumptions.append("the step as configured does not fit this machine's GPU")
    if solve:
        answers += this.solved()
    if compare:
        answers.append(this.of_open_clip())
    of_what = config.model.name, this.precision, device, budget.memory, budget.usable
    return Plan(*of_what, answers, usage, measured, assumptions, list(this.advice(usage)), ranks, exchange)


def micro_batch_that_fits(config: Config, budget: Budget, *, device: str = "cuda", ranks: int = 1) -> Config:
    """Returns `config` with the largest micro-batch whose step fits: a divisor of the batch, or None if the whole batch fits.

    ranks: the number of ranks. The micro-batch is for one rank, and a multiple of `ranks`, as the loader of a run needs.
    Raises ConfigError if even the smallest micro-batch does not fit.
    """
    fits = _Planner(config, budget, device, None, ranks).with_micro_batch().data.micro_batch
    return configs.from_dict(config.to_dict() | {"data": config.to_dict()["data"] | {"micro_batch": fits}})


class _Planner:
    """A predictor for the steps of a config, also with some values of the config changed."""

    def __init__(self, config: Config, budget: Budget, device: str, teacher_width: int | None, ranks: int = 1) -> None:
        if device == "cuda" and torch.version.cuda is None:
            raise InputError(
                f"device: expected cpu, got cuda: torch {torch.__version__} is a build without CUDA, which plans for a card "
                "need (the card itself is not needed)"
            )
        self.config, self.budget, self.teacher_width, self.ranks = config, budget, teacher_width, ranks
        if config.data.batch_size % ranks:
            raise ConfigError(f"data.batch_size: expected a multiple of {ranks} ranks, got {config.data.batch_size}")
        if ranks > 1:
            self.config = config = self.changed(data={"batch_size": config.data.batch_size // ranks})
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        if device == "cuda" and config.run.precision == "auto" and not torch.cuda.is_available():
            self.precision, self.why = "bf16", "auto: cards since Ampere have native bf16"
        else:
            self.precision, self.why = hardware.pick_precision(config.run.precision, self.device)
        self.base = self.step(config)
        try:
            gradient_cache.check(self.base.model.train())
            self.cacheable = True
        except ValueError:
            self.cacheable = False

    def changed(self, **sections: dict) -> Config:
        """Returns the config with some values changed. Unlike pydantic's model_copy, this checks the config as a whole."""
        values = self.config.to_dict()
        for section, changes in sections.items():
            values[section] |= changes
        return configs.from_dict(values)

    def step(self, config: Config) -> TrainerStep:
        step = TrainerStep(config, self.precision, self.teacher_width)
        if self.ranks > 1:
            step.loss.world_size, step.loss.gather_with_grad = self.ranks, True  # type: ignore[assignment]
        return step

    def usage(self, **sections: dict) -> Usage:
        config = self.changed(**sections)
        same = sections.keys() <= {"data"}
        step = self.base.resized(config) if same else self.step(config)
        usage, self.width = predict(step, self.device, self.ranks), step.width()
        return usage

    def exchange(self, rate: float | None) -> dict[str, Any]:
        """Returns for one rank and step: bytes sent by kind of data, seconds by link and, with `rate`, of computation."""
        data, loss = self.config.data, self.base.loss
        teacher = self.base.teacher["width"] if self.base.teacher else 0
        trained = [p for module in (self.base.model, loss) for p in module.parameters() if p.requires_grad]
        exchange = Exchange(
            self.ranks, data.batch_size * data.captions_per_image, self.width,
            itemsize=4 if self.precision == "fp32" else 2,
            terms=tuple(name.removesuffix("_loss") for name in self.config.loss.weights),
            teacher_width=teacher, ids=True,
            parameters=sum(p.numel() for p in trained),
        )  # fmt: skip
        computing = None if rate is None else data.batch_size / rate
        return {"sent": exchange.sent(), "seconds": exchange.seconds(), "computing": computing}

    def with_micro_batch(self) -> Config:
        size = self.config.data.batch_size
        few = range(self.ranks, size, self.ranks)
        micros = [*(micro for micro in few if size % micro == 0), None]  # None: the whole batch

        def peak(count: int) -> int:
            return self.usage(data={"micro_batch": micros[count - 1]}).peak

        count, seen = largest(peak, self.budget.usable, start=len(micros), most=len(micros))
        if not count:
            raise ConfigError(
                f"data.micro_batch: expected one that fits {gib(self.budget.usable)} of {gib(self.budget.memory)}, got auto; "
                f"a batch of {size:,} takes {gib(seen[1])} even with {micros[0] or size} at a time"
            )
        return self.changed(data={"micro_batch": micros[count - 1]})

    def solved(self) -> Iterator[Answer]:
        """Yields the largest batch in one graph and, if the model allows gradient caching, the largest batch with it."""
        whole = self._answer("most in one graph", lambda n: self.usage(data={"batch_size": n, "micro_batch": None}))
        yield whole
        if not self.cacheable or not whole.batch_size:
            return
        data, k = self.config.data, self.config.data.captions_per_image
        unit = data.images_at_a_time if data.micro_batch else min(SMALL_MICRO_BATCH, data.batch_size)
        most = max(1, whole.batch_size // 2)  # the largest micro-batch would leave no memory for a larger batch
        unit = most if unit >= whole.batch_size else unit
        micro: Any = unit
        if isinstance(data.micro_batch, MicroBatch):
            text = data.micro_batch.text or data.batch_size * k
            micro = {"image": unit, "text": text if text < whole.batch_size * k else most * k}
        usage = lambda n: self.usage(data={"batch_size": n, "micro_batch": micro})  # noqa: E731
        yield self._answer("most by gradient caching", usage, micro, unit)

    def of_open_clip(self) -> Answer:
        """The largest batch of the original model with open_clip's loss."""
        name = models.original(self.config.model.name)
        if name is None:
            made = self.config.model.name
            raise ConfigError(f"--compare: expected a model made from one of open_clip's or from mobileclip-s0, got {made}")
        sigmoid = self.config.loss.base == "sigmoid"  # open_clip has this loss without a teacher only
        width = self.base.teacher["width"] if "relational_loss" in self.config.loss.weights and not sigmoid else None
        options: dict[str, Any] = SIGLIP if sigmoid else {}

        def step(size: int) -> OpenClipStep:
            return OpenClipStep(name, size, self.precision, width, **options)

        what = f"most in open_clip: {name.removeprefix(models.PLAIN)}, {type(step(1).loss).__name__}"
        return self._answer(what, lambda n: predict(step(n), self.device))

    def _answer(self, what: str, usage: Callable[[int], Usage], micro_batch: Any = None, unit: int = 1) -> Answer:
        """The largest batch, a multiple of `unit`, whose usage fits."""
        start = max(8, 16384 // unit) if unit > 1 else 32
        found, seen = largest(lambda n: usage(n * unit).peak, self.budget.usable, start=start, most=MOST_PAIRS // unit)
        peaks = {n * unit: peak for n, peak in sorted(seen.items())}
        size, larger = found * unit, (found + 1) * unit
        following = (larger, peaks[larger]) if larger in peaks else (None, None)
        return Answer(what, size, micro_batch, peaks.get(size, 0), size > 0, *following, peaks)

    def advice(self, usage: Usage) -> Iterator[str]:
        """Settings that would lower the peak of the step as configured, with the new peak."""
        config = self.config
        size = config.data.batch_size
        micro: Any = config.data.micro_batch
        changes: dict[str, dict] = {}
        if not config.model.recompute:
            changes["model.recompute=true (blocks are computed again in backward)"] = {"model": {"recompute": True}}
        if micro is None and size % 4 == 0 and self.cacheable:
            changes[f"data.micro_batch={size // 4} (gradient caching)"] = {"data": {"micro_batch": size // 4}}
        elif isinstance(micro, MicroBatch):
            for tower, most in (("image", size), ("text", size * config.data.captions_per_image)):
                half = (getattr(micro, tower) or most) // 2
                if half and (tower == "text" or size % half == 0):
                    halved = micro.model_dump() | {tower: half}
                    changes[f"data.micro_batch.{tower}={half}"] = {"data": {"micro_batch": halved}}
        elif micro is not None and micro % 2 == 0:
            changes[f"data.micro_batch={micro // 2}"] = {"data": {"micro_batch": micro // 2}}
        for change, sections in changes.items():
            less = self.usage(**sections).peak
            if less < 0.99 * usage.peak:
                yield f"{change}: {gib(less)} instead of {gib(usage.peak)}"
        if config.inherit.source is None and usage.at_peak.get("activations", 0) > 0.3 * usage.peak:
            yield "inherit.source=... (a frozen prefix of a tower keeps no activations)"
        if usage.peak > self.budget.usable:
            yield "a smaller data.batch_size, or data.micro_batch=auto"


def largest(peak: Callable[[int], int], limit: int, *, start: int = 8, most: int = 1 << 24) -> tuple[int, dict[int, int]]:
    """Returns the largest x with peak(x) <= limit, or 0, and all computed peaks, among them peak(x + 1) unless x is `most`.

    Peaks are nearly affine in x, so that few are computed. Each guess is the x where a line crosses the limit: the line
    through the two points that are nearest to the answer. peak should not decrease much with x.
    """
    seen: dict[int, int] = {}
    low, high, guess = 0, most + 1, min(start, most)  # the largest x that fits, and the smallest that does not
    while high - low > 1:
        seen[guess] = peak(guess)
        low, high = (guess, high) if seen[guess] <= limit else (low, guess)
        near = sorted(seen, key=lambda x: abs(2 * x - low - high))[:2]
        a, b = min(near), max(near)
        rise = seen[b] - seen[a]
        guess = a + (limit - seen[a]) * (b - a) // rise if rise > 0 else 2 * low or high // 2
        guess = min(max(guess, low + 1), high - 1)
    return low, seen
