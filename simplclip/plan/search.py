"""Makes a plan: the step as configured, and the largest batches in one graph and by gradient
caching.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch

from simplclip import gradient_cache
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.ops.similarity.chunks import SCRATCH_BYTES, SCRATCH_BYTES_ELSEWHERE, STORE_BYTES
from simplclip.plan.cards import CARDS, GIB, Card
from simplclip.plan.count import Usage
from simplclip.plan.kernels import Launch
from simplclip.plan.measure import predict
from simplclip.plan.step import TrainerStep, steps_of_terms
from simplclip.plan.time import StepTime, step_time
from simplclip.train import step as steps
from simplclip.train.config import Config, ConfigError

WITHIN = 0.05  # the largest batch is found up to this share
# if none is configured; a larger micro-batch leaves less memory for the loss
SMALL_MICRO_BATCH = 256
MOST_PAIRS = 1 << 16  # of a search; CLIP was trained with 32,768


def gib(size: float) -> str:
    """Returns a number of bytes as text, "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class Budget:
    """The bytes of a card or a machine, and how many a step may use.

    The defaults are assumptions, not measured.
    """

    memory: int
    # of the driver, with the modules of torch and cuBLAS; on a CPU, of the process
    context: int = 640 << 20
    libraries: int = 160 << 20  # workspaces of cuBLAS and cuDNN
    fragmentation: float = 0.04  # the share of the rest that the allocator loses

    @property
    def usable(self) -> int:
        """The bytes that the tensors of a step may take."""
        return int((self.memory - self.context - self.libraries) * (1 - self.fragmentation))

    @classmethod
    def of(cls, device: torch.device) -> Budget:
        """Returns the budget of this machine's card `device` or, on a CPU, of its memory.

        Of a CPU's memory a rank has its share.
        """
        memory = hardware.total_memory(device)
        return cls(memory) if device.type == "cuda" else cls(memory, context=1 << 30, libraries=0)


@dataclass(frozen=True)
class Row:
    """A step of a plan.

    Sizes are bytes of torch's allocator; the plan's assumptions cover other memory.

    micro_batch: None: the whole batch. components: live bytes by kind at the peak. at_least: larger
    ones were not tried. time: None without a card.
    """

    what: str
    batch_size: int
    micro_batch: int | None
    peak: int
    fits: bool
    components: dict[str, int] = field(default_factory=dict)
    at_least: bool = False
    time: StepTime | None = None

    @property
    def images_per_s(self) -> float:
        """Images a second at the likely time of the step; 0 without a time."""
        return 1e3 * self.batch_size / self.time.ms if self.time else 0.0


class Graphs:
    """Predicted steps in one graph by their pairs; memory and time of others lie on the line
    through the two nearest.
    """

    def __init__(self, usages: dict[int, Usage]) -> None:
        """Stores the predicted steps: pairs in the batch -> Usage; at least one."""
        self.usages = usages

    def largest_batch(self, limit: int, card: Card) -> tuple[int, float]:
        """Returns the largest batch that takes at most `limit` bytes, and its images/s on a card.

        It is within WITHIN, and at most MOST_PAIRS; (0, 0.0) if not even one pair fits.
        """
        peaks = {size: usage.peak for size, usage in self.usages.items()}
        size = min(int((1 - WITHIN / 4) * _crossing(peaks, limit)), MOST_PAIRS)
        if size < 1:
            return 0, 0.0
        times = {pairs: step_time(usage.kernels, card).ms for pairs, usage in self.usages.items()}
        a, *others = sorted(times, key=lambda pairs: abs(pairs - size))
        b = others[0] if others else 0
        ms = times[a] + (size - a) * (times[a] - times.get(b, 0.0)) / (a - b)
        return size, 1e3 * size / ms


def predict_graphs(
    predicted: Callable[[int], Usage], least: int, most: int, tell: Callable[[str], object]
) -> Graphs:
    """Returns steps of three batches in one graph, as `predicted` predicts them from their pairs.

    They are one of SMALL_MICRO_BATCH pairs, and two that about fill `least` and `most` bytes. tell:
    is called with a line on each.
    """
    usages: dict[int, Usage] = {}
    size = SMALL_MICRO_BATCH
    for limit in (least, most, None):
        usages[size] = predicted(size)
        tell(f"in one graph: {size:,} pairs take {gib(usages[size].peak)}")
        if limit is not None:
            crossing = _crossing({size: usage.peak for size, usage in usages.items()}, limit)
            size = min(max(1, int(crossing)), MOST_PAIRS)
    return Graphs(usages)


class Planner:
    """Plans the steps of a config on a device, "cuda" or "cpu", with a budget; the device need not
    be there.

    config.data.micro_batch "auto" means the result of `find_micro_batch`. teacher_width: D̂ of the
    stored features, if the shards are not on this machine. tell: gets a line after each prediction
    of a search. card: of CARDS, for times.

    Raises: ConfigError; InputError if torch is a build without CUDA; UncountedOp if the memory of
    an op cannot be predicted.
    """

    def __init__(
        self,
        config: Config,
        budget: Budget,
        device: str = "cuda",
        teacher_width: int | None = None,
        tell: Callable[[str], object] = lambda line: None,
        card: str | None = None,
    ) -> None:
        """Makes the model on the meta device and picks the precision; predicts nothing yet."""
        if device == "cuda" and torch.version.cuda is None:
            raise InputError(
                f"device: expected cpu, got cuda: torch {torch.__version__} is a build without "
                "CUDA, which plans for a card need (the card itself is not needed)"
            )
        # memory does not depend on steps, and the data to count may be elsewhere
        if config.run.steps is None:
            config = config.replaced(run={"steps": 1 << 30, "epochs": None})
        self.config = config
        self.budget = budget
        self.tell = tell
        self.card = CARDS[card] if card else None
        self._usages: dict[tuple[int, int | None], Usage] = {}  # by batch_size and micro_batch
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        if device == "cuda" and config.run.precision == "auto" and not torch.cuda.is_available():
            self.precision = "bf16"
            why = "auto: cards since Ampere have native bf16"
            if self.card is not None and not self.card.triton:
                self.precision = "fp32"  # as pick_precision says of such a card
                why += ", this one is older"
        else:
            self.precision, why = hardware.pick_precision(config.run.precision, self.device)
        self.step = TrainerStep(config, self.precision, teacher_width, budget.memory, self.device)
        self.assumptions = [
            *_assumptions(budget, device),
            f"precision {self.precision} ({why})",
            *self.step.assumed,
        ]
        try:
            gradient_cache.check(self.step.prepared.model.train())
            self.cacheable = True
        except InputError:
            self.cacheable = False

    def rows(self) -> Iterator[Row]:
        """Yields the step as configured, then the largest batch in one graph, then with caching.

        The last one is missing if the model does not allow gradient caching, or one pair does not
        fit. A micro-batch "auto" in `config` is replaced for good.
        """
        if self.config.data.micro_batch == "auto":
            self.config = self.config.replaced(data={"micro_batch": self.find_micro_batch()})
        data = self.config.data
        assert data.micro_batch != "auto"
        yield self.predict_row("as configured", data.batch_size, data.micro_batch)
        whole = self.find_largest("largest in one graph", None)
        yield whole
        if self.cacheable and whole.batch_size:
            images = min(SMALL_MICRO_BATCH, data.batch_size)
            if data.micro_batch:
                images = data.images_at_a_time
            if images >= whole.batch_size:  # which would leave no memory for a larger batch
                images = max(1, whole.batch_size // 2)
            yield self.find_largest("largest by gradient caching", images)

    def find_micro_batch(self) -> int | None:
        """Returns the largest micro-batch whose step fits, or None if the whole batch fits.

        It is a divisor of data.batch_size. Raises ConfigError if not even the smallest one fits.
        """
        size = self.config.data.batch_size
        peak = self.predict_usage(size, None).peak
        self.tell(f"data.micro_batch = null: {gib(peak)}")
        if peak <= self.budget.usable:
            return None
        divisors = []
        if self.cacheable:
            divisors = [micro for micro in range(1, size) if size % micro == 0]

        def predict_peak(micro: int) -> int:
            peak = self.predict_usage(size, micro).peak
            self.tell(f"data.micro_batch = {micro}: {gib(peak)}")
            return peak

        start = size * self.budget.usable // peak
        micro, peaks = search_largest(predict_peak, self.budget.usable, divisors, start=start)
        if not micro:
            usable, memory = gib(self.budget.usable), gib(self.budget.memory)
            raise ConfigError(
                f"data.micro_batch: expected one that fits {usable} of {memory}, got auto; a batch "
                f"of {size:,} takes {gib(min([peak, *peaks.values()]))} even with "
                f"{min(peaks, default=size)} at a time"
            )
        return micro

    def predict_in_one_graph(self, pairs: int) -> Usage:
        """Predicts a step of so many pairs without gradient caching; see `predict_usage`."""
        return self.predict_usage(pairs, None)

    def predict_usage(self, batch_size: int, micro_batch: int | None) -> Usage:
        """Predicts the step of the config with these values in its section `data`, each once."""
        size = batch_size, micro_batch
        data = {"batch_size": batch_size, "micro_batch": micro_batch}
        self.step.config = self.config.replaced(data=data)
        if size not in self._usages:
            self._usages[size] = predict(self.step, self.device, self.card)
        return self._usages[size]

    def launches(self) -> list[Launch]:
        """Returns the launches of Triton kernels in the steps of a run, with each set of terms.

        They depend on values if a batch may have several pairs of one group, and on memory with a
        micro-batch "auto": then they are those of both cases.
        """
        data = self.config.data
        sizes = [data.micro_batch]
        if data.micro_batch == "auto":
            divisors = [size for size in range(1, data.batch_size) if data.batch_size % size == 0]
            sizes = [None, *(divisors[-1:] if self.cacheable else [])]
        groups = [steps.groups_of]
        if data.captions_per_image == 1:
            groups.append(lambda *_: None)
        kernels = []
        for number, size, groups_of in itertools.product(
            steps_of_terms(self.config).values(), sizes, groups
        ):
            self.step.number = number
            self.step.config = self.config.replaced(data={"micro_batch": size})
            with mock.patch.object(steps, "groups_of", groups_of):
                kernels += predict(self.step, self.device, self.card).kernels
        return [kernel.launch for kernel in kernels if isinstance(kernel.launch, Launch)]

    def find_largest(self, what: str, micro_batch: int | None) -> Row:
        """Returns the row of the largest batch that fits, up to the share WITHIN.

        micro_batch: pairs at a time, of which the batch is a multiple; None: one graph. If none
        fits, the row has a batch size of 0.
        """

        def predict_peak(pairs: int) -> int:
            peak = self.predict_usage(pairs, micro_batch).peak
            self.tell(f"{what}: {pairs:,} pairs take {gib(peak)}")
            return peak

        unit = micro_batch or 1
        sizes = range(unit, MOST_PAIRS + 1, unit)
        known = {}
        for (pairs, micro), usage in self._usages.items():
            if micro == micro_batch and pairs in sizes:
                known[pairs] = usage.peak
        start = MOST_PAIRS if micro_batch else SMALL_MICRO_BATCH
        size, _ = search_largest(predict_peak, self.budget.usable, sizes, start=start, known=known)
        if not size:
            return Row(what, 0, micro_batch, 0, False)
        return self.predict_row(what, size, micro_batch, at_least=size == sizes[-1])

    def predict_row(
        self, what: str, size: int, micro_batch: int | None, at_least: bool = False
    ) -> Row:
        """Predicts a step of `size` pairs and returns it as a row named `what`."""
        usage = self.predict_usage(size, micro_batch)
        time = step_time(usage.kernels, self.card) if self.card else None
        fits = usage.peak <= self.budget.usable
        return Row(what, size, micro_batch, usage.peak, fits, usage.at_peak, at_least, time)


def _assumptions(budget: Budget, device: str) -> list[str]:
    """Returns lines of text that say what the plan assumes."""
    chunks = f"chunks of {SCRATCH_BYTES_ELSEWHERE >> 20} MiB"
    if device == "cpu":
        chunks = (
            f"chunks of {SCRATCH_BYTES >> 20} MiB, and at most {STORE_BYTES >> 20} MiB of their "
            "rows kept for backward"
        )
    lines = [
        f"{budget.context >> 20} MiB for the context of the driver and of torch's libraries",
        f"{budget.libraries >> 20} MiB for workspaces inside cuBLAS and cuDNN, which no op states",
        f"{budget.fragmentation:.0%} of the rest lost to the allocator's fragmentation",
        f"in the loss, {chunks}",
        "a step after the first one: the optimizer's state exists",
    ]
    if device == "cpu":
        lines.append("nothing for what oneDNN takes inside convolutions and products of bfloat16")
    return lines


def largest_micro_batch(config: Config, device: torch.device, ranks: int = 1) -> int | None:
    """Returns the largest data.micro_batch that fits on `device`, for a config that says "auto".

    None means the whole batch. ranks: the number of ranks, which share data.batch_size; the texts
    that a rank gets from the others are not counted. Nothing runs on the device. Raises ConfigError
    if not even one pair at a time fits; UncountedOp.
    """
    share = config.replaced(
        data={"batch_size": config.data.batch_size // ranks, "micro_batch": None}
    )
    return Planner(share, Budget.of(device), device.type).find_micro_batch()


def search_largest(
    peak: Callable[[int], int],
    limit: int,
    sizes: Sequence[int],
    *,
    start: int,
    known: dict[int, int] | None = None,
) -> tuple[int, dict[int, int]]:
    """Returns the largest of the sizes with peak(size) <= limit, or 0, and all peaks {size: bytes}.

    A larger one of the sizes may fit, but none that is larger by more than the share WITHIN. Peaks
    are nearly affine in the size, so that few are computed: where the line through the two nearest
    ones crosses the limit, one is tried just below the crossing and one above it. peak should not
    decrease with the size.

    sizes: ascending. start: about the first size that is tried. known: peaks of some of the sizes,
    which are not computed again; at best of several.
    """
    peaks = dict(known or {})
    # indices of the largest size that fits, and of the smallest that does not
    low, high = -1, len(sizes)
    for size, bytes_taken in peaks.items():
        if bytes_taken <= limit:
            low = max(low, sizes.index(size))
        else:
            high = min(high, sizes.index(size))
    guess = float(start)
    if len(peaks) > 1:
        guess = (1 - WITHIN / 4) * _crossing(peaks, limit)
    most_guesses = len(peaks) + 8
    while high - low > 1:
        if low >= 0 and high < len(sizes) and sizes[high] <= (1 + WITHIN) * sizes[low]:
            break
        index = min(max(bisect_right(sizes, guess) - 1, low + 1), high - 1)
        if len(peaks) > most_guesses:  # the line is a poor guide, as where peaks hardly grow
            index = (low + high) // 2
        size = sizes[index]
        peaks[size] = peak(size)
        if peaks[size] <= limit:
            low = index
        else:
            high = index
        crossing = _crossing(peaks, limit)
        guess = (1 - WITHIN / 4) * crossing
        if low >= 0 and sizes[low] >= (1 - WITHIN / 2) * crossing:
            guess = (1 + WITHIN) * sizes[low]
    if low < 0:
        return 0, peaks
    return sizes[low], peaks


def _crossing(peaks: dict[int, int], limit: int) -> float:
    """Returns the size at which the line through the two peaks nearest to the limit crosses it."""
    nearest, *others = sorted(peaks, key=lambda size: abs(peaks[size] - limit))
    if not others:  # through 0
        return nearest * limit / peaks[nearest]
    a, b = sorted((nearest, others[0]))
    rise = (peaks[b] - peaks[a]) / (b - a)
    if rise <= 0:  # rounding, or memory that another size saves
        return 2 * b if peaks[b] <= limit else a / 2
    return a + (limit - peaks[a]) / rise
