"""The command `simplclip plan`: a plan as a table, what the run takes, or a row for each card."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence

from simplclip import data
from simplclip.common.errors import UserError
from simplclip.common.progress import duration
from simplclip.models.trained import image_transform, tokenizer
from simplclip.plan.cards import CARDS, GIB
from simplclip.plan.rates import step_ms
from simplclip.plan.search import (
    CONTEXT,
    FRAGMENTATION,
    LIBRARIES,
    MOST_PAIRS,
    SMALL_MICRO_BATCH,
    Planner,
    Row,
    gib,
    pick_precision,
    usable,
)
from simplclip.plan.step import planned
from simplclip.train.config import Config, ConfigError

ASSUMED_RATE = 300  # images a second that a worker decodes, unless measured
SECONDS = 3.0  # of that measurement
WORKERS = 16  # of a loader on a machine with one card, at most
EPOCHS = 10  # of --pairs, if the config has none
ASSUMED = (
    f"{(CONTEXT + LIBRARIES) >> 20} MiB for the driver, torch's libraries, cuBLAS and cuDNN",
    f"{FRAGMENTATION:.0%} of the rest lost to the allocator's fragmentation",
    "no compiled towers; nothing of this was measured on a GPU (docs/plan.md)",
)


def run(
    config: Config,
    memory: int,
    card: str | None = None,
    *,
    teacher_width: int | None = None,
    pairs: int | None = None,
    as_json: bool = False,
) -> None:
    """Prints the plan for `memory` bytes to stdout.

    card: a key of CARDS, for times. teacher_width: of the teacher's stored features; None: as the
    shards say. pairs: of an epoch; None: as the config or the shards say. Raises as `Planner`.
    """
    precision = pick_precision(config, card)
    limit = usable(memory)
    with planned(config, precision, "cuda", teacher_width) as step:
        planner = Planner(config, step, memory)
        rows = rows_of(planner, limit)
        configured, whole, *_ = rows.values()
        best = chosen(planner, configured, whole, limit) if card and configured else None
    if as_json:
        values = {
            "model": config.model.name,
            "precision": precision,
            "card": card,
            "memory": memory,
            "usable": limit,
            "rows": [row_values(what, row, limit, card) for what, row in rows.items()],
            "assumptions": ASSUMED,
        }
        print(json.dumps(values, indent=2))
        return
    where = card or "a GPU"
    print(f"{config.model.name}, {precision}, {where}: {gib(limit)} usable of {gib(memory)}\n")
    head = f"{'step':<28}{'pairs':>8}{'at a time':>11}{'GiB':>8}  fits"
    print(head + (f"{'ms':>10}{'images/s':>10}" if card else ""))
    for what, row in rows.items():
        print(line(row_values(what, row, limit, card)))
    print()
    if card:
        for topic, text in answers(config, best, card, pairs):
            print(f"{topic:<8}{text}")
    for text in ASSUMED:
        print(f"assumed {text}")


def rows_of(planner: Planner, limit: int) -> dict[str, Row | None]:
    """Returns the step as configured, and the largest batches in one graph and with caching.

    None where none fits; without the last one if the model does not allow gradient caching.
    """
    configured = planner.configured()
    whole = planner.largest(limit, None)
    rows = {"as configured": configured, "largest in one graph": whole}
    if planner.cacheable:
        micro = configured.micro_batch or min(SMALL_MICRO_BATCH, configured.batch_size)
        if whole and micro >= whole.batch_size:  # which would leave no memory for a larger batch
            micro = max(1, whole.batch_size // 2)
        rows["largest by gradient caching"] = planner.largest(limit, micro)
    return rows


def chosen(planner: Planner, configured: Row, whole: Row | None, limit: int) -> Row | None:
    """Returns the fastest step of the configured batch that fits, else the largest in one graph.

    whole: the latter, None if no batch fits.
    """
    size = configured.batch_size
    if whole and size <= whole.batch_size:
        return planner.row(size, None)
    if configured.peak <= limit:
        return configured
    try:
        return planner.row(size, planner.largest_micro_batch(size, limit))
    except ConfigError:
        return whole


def row_values(what: str, row: Row | None, limit: int, card: str | None) -> dict:
    """Returns a row of the table as JSON; at_least: larger batches were not tried."""
    if row is None:
        return {"what": what, "batch_size": 0, "micro_batch": None, "peak": 0, "fits": False}
    at_least = "largest" in what and row.batch_size + (row.micro_batch or 1) > MOST_PAIRS
    values = {
        "what": what,
        "batch_size": row.batch_size,
        "micro_batch": row.micro_batch,
        "peak": row.peak,
        "fits": row.peak <= limit,
        "at_least": at_least,
    }
    if card:
        values["ms"] = round(step_ms(row.works, card), 1)
        values["images_per_s"] = round(images_per_s(row, card), 1)
    return values


def line(values: dict) -> str:
    """Returns a row of the table as text, from `row_values`."""
    pairs = f"{values['batch_size']:,}" + ("+" if values.get("at_least") else "")
    at_a_time = f"{values['micro_batch']:,}" if values["micro_batch"] else "all"
    fits = "yes" if values["fits"] else "no"
    text = f"{values['what']:<28}{pairs:>8}{at_a_time:>11}{values['peak'] / GIB:>8.2f}  {fits:<4}"
    if "ms" in values:
        text += f"{values['ms']:>10,.0f}{values['images_per_s']:>10,.0f}"
    return text.rstrip()


def images_per_s(row: Row, card: str) -> float:
    """Returns the images a second of a step on a card."""
    return 1e3 * row.batch_size / step_ms(row.works, card)


def answers(
    config: Config, row: Row | None, card: str, pairs: int | None
) -> Iterator[tuple[str, str]]:
    """Yields (topic, text) for each line on the run that the plan suggests, a `chosen` row.

    Decodes images for SECONDS where the shards are here.
    """
    if row is None:
        yield "run", "no step fits; a smaller model, or frozen parts, may"
        return
    rate = images_per_s(row, card)
    yield "run", f"of {row.batch_size:,} pairs, {row.micro_batch or 'all'} at a time"
    stored = epoch_pairs(config, pairs)
    if stored:
        yield "", f"an epoch of {stored:,} pairs takes {duration_text(stored / rate)}"
    else:
        yield "", "the number of pairs is not known (--pairs)"
    images, length = run_images(config, pairs)
    if images and (config.run.epochs or config.run.steps):
        yield "", f"the run {length} takes {duration_text(images / rate)}"
    yield "loader", loader_text(rate, loader_rate(config))
    micro = row.micro_batch or "null"
    yield "paste", f"--set data.batch_size={row.batch_size} --set data.micro_batch={micro}"


def run_images(config: Config, pairs: int | None) -> tuple[float | None, str]:
    """Returns the images of a run and what they are; None if they are not known."""
    epochs, steps = config.run.epochs, config.run.steps
    if steps is not None:
        return steps * config.data.batch_size, f"of {steps:,} steps"
    stored = epoch_pairs(config, pairs)
    if not stored:
        return None, "not known without the number of pairs (--pairs)"
    text = f"{epochs:g} epochs" if epochs else f"{EPOCHS} epochs (the default)"
    return (epochs or EPOCHS) * stored, f"of {text} of {stored:,} pairs"


def epoch_pairs(config: Config, pairs: int | None) -> int | None:
    """Returns `pairs` or, of None, the pairs of an epoch that are not held out, if known."""
    if pairs or config.data.samples:
        return pairs or config.data.samples
    try:
        stored = data.dataset_size(config.data.train)
    except (UserError, OSError):
        return None
    return stored and round(stored * (1 - config.eval.hold_out))


def duration_text(seconds: float) -> str:
    """Returns seconds as text: "2.5 hours", or of less than an hour "12.0 minutes" or "7 s"."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:,.1f} minutes"
    return duration(seconds) if seconds >= 1 else "less than a second"


def loader_text(needed: float, measured: float | None) -> str:
    """Returns a text on the loader of a step that needs so many images a second.

    measured: images a second of a worker; None: they are assumed.
    """
    rate = measured or ASSUMED_RATE
    each = f"{rate:,.0f} a worker, {'measured on its shards' if measured else 'assumed'}"
    workers = math.ceil(needed / rate)
    if workers <= WORKERS:
        return f"{workers} workers for {needed:,.0f} images/s ({each})"
    most = f"{WORKERS} workers bring {WORKERS * rate:,.0f} of {needed:,.0f} images/s"
    return f"bounds the run: {most} ({each})"


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
    """Prints a row for each card that runs the library's Triton kernels; arguments: as of `run`."""
    precision = pick_precision(config, None)
    images, length = run_images(config, pairs)
    print(f"{config.model.name}, {precision}; hours: {length}\n")
    print(f"{'':<18}{'largest in one graph':>28}{'the run':>34}")
    heads = ("GiB", "pairs", "images/s", "pairs", "at a time", "images/s", "hours")
    print(card_line("card", heads))
    with planned(config, precision, "cuda", teacher_width) as step:
        planner = Planner(config, step)
        for name, card in CARDS.items():
            if not card.triton:
                continue
            planner.memory = card.memory * GIB
            limit = usable(planner.memory)
            whole = planner.largest(limit, None)
            best = chosen(planner, planner.configured(), whole, limit)
            cells = [str(card.memory)] + 6 * ["-"]
            if whole:
                cells[1:3] = f"{whole.batch_size:,}", f"{images_per_s(whole, name):,.0f}"
            if best:
                rate = images_per_s(best, name)
                cells[3:5] = f"{best.batch_size:,}", f"{best.micro_batch or 'all'}"
                cells[5:] = f"{rate:,.0f}", f"{images / rate / 3600:,.1f}" if images else "-"
            print(card_line(name, cells))
    most = WORKERS * ASSUMED_RATE
    print(f"\nloader  {WORKERS} workers bring {most:,} images/s ({ASSUMED_RATE} a worker, assumed)")


def card_line(card: str, cells: Sequence[str]) -> str:
    """Returns a row of the table of cards; cells: as in the head that `run_all` prints."""
    widths = (4, 8, 10, 9, 10, 10, 8)
    return f"{card:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
