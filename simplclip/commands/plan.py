"""The command `simplclip plan`."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Overrides
from simplclip.common.errors import InputError, UserError
from simplclip.plan.cards import CARDS, GIB, step_ms

if TYPE_CHECKING:
    from simplclip.plan.step import Row, Step
    from simplclip.train.config import Config

# Required keys, which a config or a model that is only planned may lack.
REQUIRED = {"data": {"train": "planned/*.tar"}, "run": {"out": "runs/planned"}}
SMALL_MICRO_BATCH = 256  # if none is configured
DECODED = 300  # images a second, by a loader's worker
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
    card: Annotated[
        str,
        typer.Option(
            help="A card, rtx-3090 or a100-40 ..., or its memory as on the box: 12GB, which is "
            "12GiB."
        ),
    ],
    *,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and the time of a training step without the card, and the largest batches
    that fit.
    """
    from simplclip.models.naming import check_name
    from simplclip.train import config as configs

    values = configs.from_dict(configs.override(read_planned_config(config), set_ or ()))
    check_name(values.model.name, "model.name")
    name, memory = parse_card(card)
    precision = values.run.precision
    if precision == "auto":  # as pick_precision says of the card
        precision = "bf16" if name is None or CARDS[name].architecture >= 80 else "fp32"
    import torch

    if torch.version.cuda is None:
        raise InputError(
            "torch: expected a build with CUDA, which a plan needs (the card itself is not), got "
            f"{torch.__version__}"
        )
    from simplclip.plan.step import Step

    step = Step(values, precision)
    rows = [values_of(*each, name) for each in rows_of(step, values, memory)]
    best = chosen(step, values, memory)
    if as_json:
        about = {"model": values.model.name, "precision": precision, "card": name}
        print(json.dumps(about | {"memory": memory, "rows": rows}, indent=2))
        return
    print(f"{values.model.name}, {precision}")
    print("\n".join(table(rows, memory, name)))
    for topic, text in answers(best, values, name) if name else ():
        print(f"{topic:<9}{text}")
    for text in ASSUMED:
        print(f"assumed  {text}")


def rows_of(step: Step, config: Config, memory: int) -> Iterator[tuple[str, Row | None]]:
    """Yields the step as configured, and the largest batches in one graph and by gradient caching,
    with their names.

    A row is None if no batch fits; the last one is missing if the model does not allow caching.
    """
    size, micro = config.data.batch_size, config.data.micro_batch
    if micro == "auto":
        micro = step.fitting(size, memory).micro_batch
    yield "as configured", step.row(size, micro, memory)
    whole = step.largest(memory)
    yield "largest in one graph", whole
    micro = micro or min(SMALL_MICRO_BATCH, size)
    if whole and micro >= whole.batch_size:  # which would leave no memory for a larger batch
        micro = max(1, whole.batch_size // 2)
    with contextlib.suppress(InputError):
        yield "largest by gradient caching", step.largest(memory, micro)


def chosen(step: Step, config: Config, memory: int) -> Row | None:
    """Returns the fastest step of the configured batch that fits; else the largest in one graph."""
    size, micro = config.data.batch_size, config.data.micro_batch
    for configured in (None, micro) if isinstance(micro, int) else (None,):
        row = step.row(size, configured, memory)
        if row.fits:
            return row
    try:
        return step.fitting(size, memory)
    except InputError:
        return step.largest(memory)


def values_of(what: str, row: Row | None, card: str | None) -> dict[str, Any]:
    """Returns a row of the plan as JSON. at_least: larger batches were not tried."""
    from simplclip.plan.step import MOST_PAIRS

    if row is None:
        return {"what": what, "batch_size": 0, "fits": False}
    values: dict[str, Any] = {"what": what} | row._asdict()
    del values["works"]
    values["at_least"] = row.batch_size + (row.micro_batch or 1) > MOST_PAIRS
    if card:
        ms = step_ms(row.works, card)
        values |= {"ms": round(ms, 1), "images_per_s": round(1e3 * row.batch_size / ms, 1)}
    return values


def table(rows: list[dict[str, Any]], memory: int, card: str | None) -> Iterator[str]:
    """Yields the lines of a plan's table."""
    from simplclip.plan.step import usable

    yield f"{card or 'a GPU'}: {usable(memory) / GIB:.2f} of {memory / GIB:.2f} GiB are usable\n"
    head = f"{'step':<27}{'pairs':>9}{'at a time':>10}{'GiB':>8}  fits"
    yield head + (f"{'ms':>10}{'images/s':>10}" if card else "")
    for row in rows:
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


def answers(row: Row | None, config: Config, card: str) -> Iterator[tuple[str, str]]:
    """Yields (topic, text) for each line on the run of a `chosen` row."""
    if row is None:
        yield "run", "no step fits; a smaller model, or frozen parts, may"
        return
    rate = 1e3 * row.batch_size / step_ms(row.works, card)
    images, length = run_images(config)
    hours = f"{images / rate / 3600:,.1f} hours" if images else "unknown hours"
    yield "run", f"{rate:,.0f} images/s; {length}: {hours}"
    yield "loader", f"{math.ceil(rate / DECODED)} workers, if each decodes {DECODED} images/s"
    micro = row.micro_batch or "null"
    yield "paste", f"--set data.batch_size={row.batch_size} --set data.micro_batch={micro}"


def run_images(config: Config) -> tuple[float | None, str]:
    """Returns the images of a run, None if unknown, and what they are."""
    from simplclip import data

    steps, epochs, epoch = config.run.steps, config.run.epochs or EPOCHS, config.data.samples
    if steps is not None:
        return steps * config.data.batch_size, f"{steps:,} steps"
    if not epoch:
        with contextlib.suppress(UserError, OSError):
            stored = data.dataset_size(config.data.train)
            epoch = stored and round(stored * (1 - config.eval.hold_out))
    if not epoch:
        return None, "an unknown number of pairs (data.samples)"
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


def parse_card(text: str) -> tuple[str | None, int]:
    """Returns the key of CARDS that a text names, or None, and the bytes of the card's memory.

    It is such as "RTX 3090" or "3090", in any case, or a size such as "24GB", which means "24GiB":
    the memory of cards is counted in powers of two, though vendors write GB.
    """
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    for card in (name, f"rtx-{name}"):
        if card in CARDS:
            return card, CARDS[card].memory * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-?([mg])i?b", name)
    if not match or not float(match[1]):
        raise InputError(
            f"--card: expected one of {', '.join(CARDS)}, or a size of memory such as 24GiB, got "
            f"{text!r}"
        )
    return None, int(float(match[1]) * {"m": 1 << 20, "g": GIB}[match[2]])
