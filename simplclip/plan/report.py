"""The command `simplclip plan`: a plan as a table that grows row by row, what the run takes, or a
row for each card.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console

from simplclip import data
from simplclip.common.errors import UserError
from simplclip.common.progress import duration
from simplclip.models.trained import image_transform, tokenizer
from simplclip.plan.cards import CARDS, GIB, Card
from simplclip.plan.count import WEIGHTS
from simplclip.plan.search import Budget, Planner, Row, gib, predict_graphs
from simplclip.plan.time import FITTED, HELD_OUT, HOST_MS, StepTime, column, step_time
from simplclip.train.config import Config

COLUMNS = ("peak", "weights", "activations", "loss", "other")  # in GiB
ASSUMED_RATE = 300  # images a second that a worker decodes, unless measured
SECONDS = 3.0  # of that measurement
WORKERS = 16  # of a loader on a machine with one card, at most
EPOCHS = 10  # of --pairs, if the config has none


class Output:
    """Context of a plan that is printed row by row to stdout, with its progress on stderr.

    On a terminal the progress is one line, which changes and vanishes; elsewhere it is lines.
    """

    def __init__(self, model: str) -> None:
        """Says that the work on a model, by its name, takes a while."""
        console = Console(stderr=True)
        text = f"predicting {model}, which may take a minute"
        self._status = console.status(text) if console.is_terminal else None
        if self._status is None:
            self.tell(text)

    def __enter__(self) -> Output:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()

    def tell(self, line: str) -> None:
        """Shows a line of progress."""
        if self._status:
            self._status.update(line)
        else:
            print(f"    {line}", file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Prints a line to stdout, above the progress."""
        self.__exit__()
        print(line, flush=True)
        self.__enter__()


def run(
    config: Config,
    memory: int,
    card: str | None = None,
    *,
    device: str = "cuda",
    teacher_width: int | None = None,
    pairs: int | None = None,
    as_json: bool = False,
) -> None:
    """Prints the plan for `memory` bytes to stdout, and its progress to stderr.

    card: a key of CARDS, for times. device: "cuda" or "cpu", which need not be there.
    teacher_width: of the teacher's stored features; None: as the shards say. pairs: of an epoch;
    None: as the config or the shards say. Raises as `Planner`.
    """
    card = card if device == "cuda" else None
    with Output(config.model.name) as output:
        planner = Planner(config, Budget(memory), device, teacher_width, output.tell, card)
        if as_json:
            values = {
                "model": config.model.name,
                "precision": planner.precision,
                "device": device,
                "card": card,
                "memory": memory,
                "usable": planner.budget.usable,
                "rows": [asdict(row) for row in planner.rows()],
                "assumptions": planner.assumptions,
            }
            lines = [json.dumps(values, indent=2)]
        else:
            lines = [""]
            rows = _print_rows(planner, card, output)
            if card:
                lines += [
                    f"{topic:<11}{text}" for topic, text in answers(config, planner, rows, pairs)
                ]
            measured = "nothing of this model: predicted from fake tensors"
            if device == "cuda":
                measured += ", no step ran on a GPU"
            lines.append(f"measured   {measured}")
            lines += [f"assumed    {assumption}" for assumption in planner.assumptions]
    print("\n".join(lines))


def _print_rows(planner: Planner, card: str | None, output: Output) -> list[Row]:
    """Prints the plan's table row by row, and returns its rows; card: as in `run`."""
    budget, device = planner.budget, planner.device.type
    output.print(
        f"{planner.config.model.name}, {planner.precision}, {card or device}: "
        f"{gib(budget.usable)} usable of {gib(budget.memory)}; sizes in GiB at the peak, with\n"
        "weights: parameters, their gradients, averages and optimizer state\n"
    )
    head = f"{'step':<28}{'pairs':>8} {'at a time':>10}"
    head += "".join(f"{name:>12}" for name in COLUMNS) + "  fits"
    if card:
        head += "".join(f"{name:>11}" for name in ("ms likely", "at least", "images/s"))
    output.print(head)
    rows = []
    for row in planner.rows():
        rows.append(row)
        output.print(line(row))
    return rows


def line(row: Row) -> str:
    """Returns a row of the table as text."""
    pairs = f"{row.batch_size:,}"
    if row.at_least:
        pairs += "+"
    at_a_time = f"{row.micro_batch:,}" if row.micro_batch else "all"
    sizes: dict[str, int] = {
        "weights": sum(row.components.get(kind, 0) for kind in WEIGHTS),
        "activations": row.components.get("activations", 0),
        "loss": row.components.get("loss", 0),
    }
    sizes["other"] = row.peak - sum(sizes.values())
    sizes["peak"] = row.peak
    cells = "".join(f"{sizes[name] / GIB:>12.2f}" for name in COLUMNS)
    fits = "yes" if row.fits else "no"
    line = f"{row.what:<28}{pairs:>8} {at_a_time:>10}{cells}  {fits}"
    if row.time is None:
        return line
    width = 15 - len(fits)
    return line + f"{row.time.ms:>{width},.0f}{row.time.least:>11,.0f}{row.images_per_s:>11,.0f}"


def answers(
    config: Config, planner: Planner, rows: list[Row], pairs: int | None
) -> Iterator[tuple[str, str]]:
    """Yields (topic, text) for each line on the run that the plan suggests, for a card.

    rows: all of `planner.rows()`. Decodes images for SECONDS where the shards are here.
    """
    row = chosen(planner, rows)
    if row is None:
        yield "run", "no step fits; a smaller model, or frozen parts, may"
        return
    assert row.time is not None
    assert planner.card is not None
    at_a_time = f"of {row.batch_size:,} pairs, {row.micro_batch or 'all'} at a time"
    yield "run", f"{at_a_time}: {_run_length_text(config, row, pairs)}"
    yield "bound by", bounds(row.time)
    yield "loader", loader_text(row.images_per_s, loader_rate(config))
    yield "error", errors(planner.card)
    micro = row.micro_batch or "null"
    yield "paste", f"--set data.batch_size={row.batch_size} --set data.micro_batch={micro}"


def chosen(planner: Planner, rows: list[Row]) -> Row | None:
    """Returns the fastest step of the configured batch that fits, else the largest batch that fits.

    It may predict other steps by the planner.
    """
    configured, whole, *cached = rows
    size = planner.config.data.batch_size
    if configured.micro_batch is None or size > whole.batch_size:
        steps = [configured, *cached, whole]
    else:
        steps = [planner.predict_row("in one graph", size, None), configured]
    if cached and cached[0].batch_size >= size and not configured.fits:
        largest = cached[0].micro_batch or size
        micro = next(n for n in range(largest, 0, -1) if size % n == 0)
        steps = [planner.predict_row("by gradient caching", size, micro), *steps]
    return next((row for row in steps if row.fits and row.batch_size), None)


def _run_length_text(config: Config, row: Row, pairs: int | None) -> str:
    """Returns a text with the time of an epoch and of the run, as far as it is known."""
    pairs = _epoch_pairs(config, pairs)
    epoch = "the number of pairs is not known (--pairs)"
    if pairs:
        epoch = f"an epoch of {pairs:,} pairs takes {_duration_text(pairs / row.images_per_s)}"
    if config.run.steps is not None:
        steps = config.run.steps
        length = f"{steps:,} steps"
    elif config.run.epochs and pairs:
        steps = round(config.run.epochs * pairs / row.batch_size)
        length = f"{config.run.epochs:g} epochs"
    else:
        return epoch
    assert row.time is not None
    return f"{epoch}, the run of {length} {_duration_text(steps * row.time.ms / 1e3)}"


def _epoch_pairs(config: Config, pairs: int | None) -> int | None:
    """Returns `pairs` or, of None, the pairs of an epoch that are not held out, if known."""
    if pairs or config.data.samples:
        return pairs or config.data.samples
    try:
        stored = data.dataset_size(config.data.train)
    except (UserError, OSError):
        return None
    return stored and round(stored * (1 - config.eval.hold_out))


def _duration_text(seconds: float) -> str:
    """Returns seconds as text: "2.5 hours", or of less than an hour "12.0 minutes" or "7 s"."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:,.1f} minutes"
    return duration(seconds) if seconds >= 1 else "less than a second"


def bounds(step: StepTime) -> str:
    """Returns a text: the shares of a step's time by what bounds it, and the host's time."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in step.shares.items())
    host = (
        f"the host starts {step.launches:,} kernels in {step.host:,.0f} ms, at {1e3 * HOST_MS:.0f} "
        "µs each (assumed)"
    )
    slow = "; the host bounds the step" if step.host > step.likely else ""
    return f"{shares}; of all {step.own / step.likely:.0%} in this library's kernels; {host}{slow}"


def errors(card: Card) -> str:
    """Returns a text on how well other models were predicted."""
    parts = []
    for mode, words, index in (("train", "trained", 0), ("infer", "in inference", column(card))):
        median = HELD_OUT[f"{mode} median_error"][index]
        within = HELD_OUT[f"{mode} within_35"][index]
        parts.append(
            f"{words} on an {FITTED[index]}, half to {median:.0%}, {within:.0%} of them to 35%"
        )
    return f"timm's models were predicted, {'; '.join(parts)} (docs/plan.md)"


def loader_text(needed: float, measured: float | None) -> str:
    """Returns a text on the loader of a step that needs so many images a second.

    measured: images a second of a worker; None: they are assumed.
    """
    rate = measured or ASSUMED_RATE
    origin = "measured here on its shards" if measured else "assumed: its shards are not here"
    each = f"({rate:,.0f} images/s a worker, {origin})"
    workers = math.ceil(needed / rate)
    if workers <= WORKERS:
        return f"{workers} workers for {needed:,.0f} images/s {each}"
    return (
        f"bounds the run: {WORKERS} workers bring {WORKERS * rate:,.0f} of {needed:,.0f} images/s "
        f"{each}"
    )


def loader_rate(config: Config) -> float | None:
    """Returns the images a second that one process decodes of the run's training shards.

    None if the shards cannot be read here.
    """
    section = config.model.model_dump()
    try:
        loader = data.Loader(
            config.data.train,
            tokenizer=tokenizer(section),
            transform=image_transform(section, train=True, augment=config.data.augment),
            batch_size=8,
            captions_per_image=config.data.captions_per_image,
            shuffle_buffer=8,
        )
        batches = iter(loader)
        next(batches)
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            images += len(next(batches)["key"])
        return images / (time.perf_counter() - start)
    except (UserError, OSError, ValueError):
        return None


def run_all(config: Config, *, teacher_width: int | None = None, pairs: int | None = None) -> None:
    """Prints a row for each card that runs the library's Triton kernels; progress to stderr.

    The cards share the fake runs, which are those of an RTX 3090; teacher_width, pairs: as in
    `run`.
    """
    cards = {name: card for name, card in CARDS.items() if card.triton}
    limits = {name: Budget(card.memory * GIB).usable for name, card in cards.items()}
    with Output(config.model.name) as output:
        budget = Budget(CARDS["rtx-3090"].memory * GIB)
        planner = Planner(config, budget, "cuda", teacher_width, output.tell, "rtx-3090")
        size, micro = config.data.batch_size, config.data.micro_batch
        if micro == "auto":
            micro = planner.find_micro_batch()
        configured = planner.predict_usage(size, micro)
        graphs = predict_graphs(
            planner.predict_in_one_graph, min(limits.values()), max(limits.values()), output.tell
        )
    images, length = _run_images(config, pairs)
    print(f"{config.model.name}, {planner.precision}, {size:,} pairs, {micro or 'all'} at a time")
    print(f"hours: {length}\n")
    print(f"{'':<23}{'largest in one graph':>21}   the run as configured")
    heads = ("pairs", "images/s", "fits", "images/s", "hours")
    print(_card_line("card", "GiB", heads))
    fastest = 0.0
    replaced = False  # whether a card's hours are those of another batch
    for name, card in cards.items():
        largest, largest_rate = graphs.largest_batch(limits[name], card)
        rate = 1e3 * size / step_time(configured.kernels, card).ms
        cells = [f"{largest:,}", f"{largest_rate:,.0f}", "yes", f"{rate:,.0f}"]
        if not largest:
            cells[:2] = "-", "-"
        if configured.peak > limits[name]:
            cells[2:] = "no", "-"
            rate = largest_rate
            replaced = replaced or bool(largest)
        hours = "-"
        if images and rate:
            needed = images / rate / 3600
            hours = f"{needed:,.1f}" if needed >= 0.05 else "<0.1"
        row = _card_line(name, str(card.memory), (*cells, hours))
        print(row if name in FITTED else f"{row}  *")
        fastest = max(fastest, rate)
    print("\n* at the efficiency of a card that others measured, of the nearest architecture")
    if replaced:
        print("Where the run does not fit, its hours are those of the largest batch.")
    if fastest > WORKERS * ASSUMED_RATE:
        print(
            f"Above {WORKERS * ASSUMED_RATE:,} images/s the loader is slower: {WORKERS} workers of "
            f"{ASSUMED_RATE} (assumed)."
        )


def _run_images(config: Config, pairs: int | None) -> tuple[float | None, str]:
    """Returns the images of a run and what they are; None if they are not known."""
    epochs = config.run.epochs
    steps = config.run.steps
    if steps is not None and not pairs:
        return steps * config.data.batch_size, f"of the run's {steps:,} steps (--pairs: of epochs)"
    stored = _epoch_pairs(config, pairs)
    if not stored:
        return None, "not known without the number of pairs (--pairs)"
    text = f"{epochs:g} epochs" if epochs else f"{EPOCHS} epochs (the default)"
    return (epochs or EPOCHS) * stored, f"of {text} of {stored:,} pairs"


def _card_line(card: str, memory: str, cells: Sequence[str]) -> str:
    """Returns a row of the table of cards; cells: as in the head that `run_all` prints."""
    pairs, rate, fits, run_rate, hours = cells
    return f"{card:<18}{memory:>5}{pairs:>11}{rate:>10}   {fits:<5}{run_rate:>10}{hours:>10}"
