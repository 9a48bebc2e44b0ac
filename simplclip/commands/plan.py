"""The command `simplclip plan`."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Overrides
from simplclip.common.errors import InputError, UserError

if TYPE_CHECKING:
    from simplclip.plan.step import Row, Step
    from simplclip.train.config import Config

# Required keys, which a config or a model that is only planned may lack.
REQUIRED = {"data": {"train": "planned/*.tar"}, "run": {"out": "runs/planned"}}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}  # of a number of pairs
SMALL_MICRO_BATCH = 256  # if none is configured
RATE, WORKERS = 300, 16  # images a second that a loader's worker decodes; the most workers
EPOCHS = 10  # of a run, if the config has neither steps nor epochs
ASSUMED = (
    "800 MiB for the driver, torch's libraries, cuBLAS and cuDNN",
    "4% of the rest is lost by the allocator",
    "no compiled towers; nothing was measured on a GPU (docs/plan.md)",
)


@app.command(
    short_help="Predict the memory of a training step.",
    epilog="Example: simplclip plan siclip-s0 --card 3090",
)
def plan(
    config: Annotated[
        str,
        typer.Argument(
            help="YAML file or name of a built-in config, as in train; or a model, "
            "open_clip:ViT-B-32."
        ),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            "--card",
            help="A card, rtx-3090 or a100-40 ..., or its memory as on the box: 12GB, which is "
            "12GiB.",
        ),
    ] = None,
    *,
    cards: Annotated[
        Literal["all"] | None, typer.Option(help="Print one row for each card that is known.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="Pairs of an epoch, 12.4M or 500k. Default: data.samples, or what the shards' "
            "meta.json says."
        ),
    ] = None,
    set_: Overrides = None,
    teacher_width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Width of the teacher's stored features, if the shards are not on this machine.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and the time of a training step without the card, and the largest batches
    that fit.
    """
    from simplclip.models.naming import check_name
    from simplclip.plan.cards import CARDS
    from simplclip.train import config as configs

    if (memory is None) == (cards is None):
        raise InputError("--card: expected a card or the size of its memory, or --cards all")
    if cards is not None and as_json:
        raise InputError("--cards: expected no --json beside it, got it")
    epoch = parse_count(pairs)
    values = configs.from_dict(configs.override(read_planned_config(config), set_ or ()))
    check_name(values.model.name, "model.name")
    size = None if memory is None else parse_memory(memory)
    card = None if memory is None else named(memory)
    precision = values.run.precision
    if precision == "auto":  # as pick_precision says of the card
        precision = "bf16" if card is None or CARDS[card].triton else "fp32"
    import torch

    if torch.version.cuda is None:
        raise InputError(
            "torch: expected a build with CUDA, which a plan needs (the card itself is not), got "
            f"{torch.__version__}"
        )
    from simplclip.plan.step import planned

    with planned(values, precision, teacher_width=teacher_width) as step:
        if size is None:
            lines = list(lines_of_cards(step, values, epoch))
        elif as_json:
            rows = [values_of(*each, size, card) for each in rows_of(step, values, size)]
            about = {"model": values.model.name, "precision": precision, "card": card}
            lines = [json.dumps(about | {"memory": size, "rows": rows}, indent=2)]
        else:
            lines = list(lines_of(step, values, size, card, epoch))
    if not as_json:
        print(f"{values.model.name}, {precision}")
    print("\n".join(lines))


def rows_of(step: Step, config: Config, memory: int) -> Iterator[tuple[str, Row | None]]:
    """Yields the step as configured, and the largest batches in one graph and by gradient caching,
    with their names.

    A row is None if no batch fits; the last one is missing if the model does not allow caching.
    """
    from simplclip.plan.search import fitting, largest

    size, micro = config.data.batch_size, config.data.micro_batch
    if micro == "auto":
        micro = fitting(step, size, memory).micro_batch
    yield "as configured", step.row(size, micro, memory)
    whole = largest(step, memory)
    yield "largest in one graph", whole
    if step.cacheable:
        micro = micro or min(SMALL_MICRO_BATCH, size)
        if whole and micro >= whole.batch_size:  # which would leave no memory for a larger batch
            micro = max(1, whole.batch_size // 2)
        yield "largest by gradient caching", largest(step, memory, micro)


def chosen(step: Step, config: Config, memory: int) -> Row | None:
    """Returns the fastest step of the configured batch that fits; else the largest in one graph."""
    from simplclip.plan.search import fitting, largest, usable
    from simplclip.train.config import ConfigError

    size, micro = config.data.batch_size, config.data.micro_batch
    whole = step.row(size, None, memory)
    if whole.peak > usable(memory) and isinstance(micro, int):
        configured = step.row(size, micro, memory)
        if configured.peak <= usable(memory):
            return configured
    try:
        return fitting(step, size, memory)
    except ConfigError:
        return largest(step, memory)


def values_of(what: str, row: Row | None, memory: int, card: str | None) -> dict[str, Any]:
    """Returns a row of the plan as JSON. at_least: larger batches were not tried."""
    from simplclip.plan.rates import step_ms
    from simplclip.plan.search import MOST_PAIRS, usable

    if row is None:
        return {"what": what, "batch_size": 0, "fits": False}
    values: dict[str, Any] = {"what": what} | row._asdict() | {"fits": row.peak <= usable(memory)}
    del values["works"]
    values["at_least"] = row.batch_size + (row.micro_batch or 1) > MOST_PAIRS
    if card:
        ms = step_ms(row.works, card)
        values |= {"ms": round(ms, 1), "images_per_s": round(1e3 * row.batch_size / ms, 1)}
    return values


def lines_of(
    step: Step, config: Config, memory: int, card: str | None, epoch: int | None
) -> Iterator[str]:
    """Yields the table of a plan and, for a card, what the run takes; epoch: pairs, if known."""
    from simplclip.plan.cards import GIB
    from simplclip.plan.search import usable

    yield f"{card or 'a GPU'}: {usable(memory) / GIB:.2f} of {memory / GIB:.2f} GiB are usable\n"
    head = f"{'step':<27}{'pairs':>9}{'at a time':>10}{'GiB':>8}  fits"
    yield head + (f"{'ms':>10}{'images/s':>10}" if card else "")
    for each in rows_of(step, config, memory):
        row = values_of(*each, memory, card)
        if not row["batch_size"]:
            yield f"{row['what']:<27}{'0':>9}"
            continue
        pairs = f"{row['batch_size']:,}{'+' if row['at_least'] else ''}"
        at_a_time = f"{row['micro_batch']:,}" if row["micro_batch"] else "all"
        fits = "yes" if row["fits"] else "no"
        line = f"{row['what']:<27}{pairs:>9}{at_a_time:>10}{row['peak'] / GIB:>8.2f}  {fits:<4}"
        if card:
            line += f"{row['ms']:>10,.0f}{row['images_per_s']:>10,.0f}"
        yield line.rstrip()
    yield ""
    if card:
        for topic, text in answers(chosen(step, config, memory), config, card, epoch):
            yield f"{topic:<9}{text}"
    for text in ASSUMED:
        yield f"assumed  {text}"


def answers(
    row: Row | None, config: Config, card: str, epoch: int | None
) -> Iterator[tuple[str, str]]:
    """Yields (topic, text) for each line on the run of a `chosen` row."""
    from simplclip.plan.rates import step_ms

    if row is None:
        yield "run", "no step fits; a smaller model, or frozen parts, may"
        return
    rate = 1e3 * row.batch_size / step_ms(row.works, card)
    micro = row.micro_batch or "null"
    images, length = run_images(config, epoch)
    hours = f"{images / rate / 3600:,.1f} hours" if images else "unknown hours"
    yield "run", f"{rate:,.0f} images/s; {length}: {hours}"
    workers = math.ceil(rate / RATE)
    text = f"{workers} workers, if each decodes {RATE} images/s"
    if workers > WORKERS:
        text = f"bounds the run: {WORKERS} workers decode {WORKERS * RATE:,} images/s (assumed)"
    yield "loader", text
    yield "paste", f"--set data.batch_size={row.batch_size} --set data.micro_batch={micro}"


def lines_of_cards(step: Step, config: Config, epoch: int | None) -> Iterator[str]:
    """Yields a table with a row for each card that runs the library's Triton kernels."""
    from simplclip.plan.cards import CARDS, GIB
    from simplclip.plan.rates import step_ms
    from simplclip.plan.search import largest

    images, length = run_images(config, epoch)
    yield f"hours: of {length}\n"
    yield f"{'':<22}{'largest in one graph':>22}{'the run':>35}"
    heads = ("pairs", "images/s", "pairs", "at a time", "images/s", "hours")
    yield card_line("card", "GiB", heads)
    for name, card in CARDS.items():
        if not card.triton:
            continue
        memory = card.memory * GIB
        whole, best = largest(step, memory), chosen(step, config, memory)
        cells = 6 * ["-"]
        if whole:
            rate = 1e3 * whole.batch_size / step_ms(whole.works, name)
            cells[:2] = f"{whole.batch_size:,}", f"{rate:,.0f}"
        if best:
            rate = 1e3 * best.batch_size / step_ms(best.works, name)
            hours = f"{images / rate / 3600:,.1f}" if images else "-"
            at_a_time = f"{best.micro_batch or 'all'}"
            cells[2:] = f"{best.batch_size:,}", at_a_time, f"{rate:,.0f}", hours
        yield card_line(name, str(card.memory), cells)


def card_line(card: str, memory: str, cells: Sequence[str]) -> str:
    """Returns a row of the table of cards."""
    widths = (11, 11, 8, 11, 9, 7)
    return f"{card:<18}{memory:>4}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths))


def run_images(config: Config, epoch: int | None) -> tuple[float | None, str]:
    """Returns the images of a run, None if unknown, and what they are; epoch: pairs of one."""
    from simplclip import data

    steps, epochs = config.run.steps, config.run.epochs or EPOCHS
    if steps is not None:
        return steps * config.data.batch_size, f"{steps:,} steps"
    epoch = epoch or config.data.samples
    if not epoch:
        with contextlib.suppress(UserError, OSError):
            stored = data.dataset_size(config.data.train)
            epoch = stored and round(stored * (1 - config.eval.hold_out))
    if not epoch:
        return None, "an unknown number of pairs (--pairs)"
    return epochs * epoch, f"{epochs:g} epochs of {epoch:,} pairs"


def read_planned_config(source: str) -> dict[str, Any]:
    """Returns the values of a config, or of a model's with defaults, with REQUIRED ones added."""
    from simplclip.models.naming import NAMES, PLAIN
    from simplclip.models.naming import configs as built_in
    from simplclip.train import config as configs

    is_config = Path(source).is_file() or source in built_in()
    if not is_config and (source in NAMES or source.startswith(PLAIN)):
        return {"model": {"name": source}, **deepcopy(REQUIRED)}
    values = configs.read(source)
    for section, required in REQUIRED.items():
        configured = values.get(section)
        if configured is None or isinstance(configured, dict):
            values[section] = required | (configured or {})
    return values


def parse_count(text: str | None) -> int | None:
    """Returns the integer that "12.4M", "500k" or "1,000" means; InputError if it is below 1."""
    if text is None:
        return None
    number = text.replace(",", "")
    factor = UNITS.get(number[-1:].lower(), 1)
    if factor > 1:
        number = number[:-1]
    try:
        count = round(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise InputError(f"--pairs: expected a number of pairs such as 12.4M, got {text!r}")
    return count


def named(text: str) -> str | None:
    """Returns the key of CARDS that `text` names, or None if there is none.

    `text` is such as "RTX 3090", "3090" or "4060 Ti 16GB", in any case.
    """
    from simplclip.plan.cards import CARDS

    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    for card in (name, f"rtx-{name}"):
        if card in CARDS:
            return card
        short, _, size = card.rpartition("-")
        if short in CARDS and size == f"{CARDS[short].memory}gb":
            return short
    return None


def parse_memory(text: str) -> int:
    """Returns the bytes of a size such as "24GiB", or of a card. Raises InputError, of --card.

    "24GB" means "24GiB": the memory of cards is counted in powers of two, though vendors write GB.
    """
    from simplclip.plan.cards import CARDS, GIB

    if (card := named(text)) is not None:
        return CARDS[card].memory * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])I?B", text.strip().upper())
    if not match or not float(match[1]):
        raise InputError(
            f"--card: expected one of {', '.join(CARDS)}, or a size of memory such as 24GiB, got "
            f"{text!r}"
        )
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])
