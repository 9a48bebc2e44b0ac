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
    rows = dict(rows_of(step, values, memory))
    most = {form: largest(step, row, memory) for form, row in rows.items()}
    best = fastest(rows, most, name)
    if as_json:
        about = {"model": values.model.name, "precision": precision, "card": name}
        listed = [values_of(form, rows[form], most[form], name) for form in rows]
        print(json.dumps(about | {"memory": memory, "fastest": best, "rows": listed}, indent=2))
        return
    print(f"{values.model.name}, {precision}, {values.data.batch_size:,} pairs")
    print("\n".join(table(rows, most, memory, name)))
    for topic, text in answers(best, rows[best] if rows[best].fits else most[best], values, name):
        print(f"{topic:<9}{text}")
    for text in ASSUMED:
        print(f"assumed  {text}")


def rows_of(step: Step, config: Config, memory: int) -> Iterator[tuple[str, Row]]:
    """Yields the step of the configured batch in each form, with its name.

    The last two are missing if the model does not allow gradient caching.
    """
    size, micro = config.data.batch_size, config.data.micro_batch
    yield "plain", step.row(size, None, memory, checkpointed=False)
    yield "checkpointed", step.row(size, None, memory, checkpointed=True)
    for form, checkpointed in (("cached", False), ("checkpointed, cached", True)):
        with contextlib.suppress(InputError):
            if isinstance(micro, int):
                yield form, step.row(size, micro, memory, checkpointed)
            else:
                yield form, step.cached(size, memory, checkpointed)


def largest(step: Step, row: Row, memory: int) -> Row | None:
    """Returns the largest batch of a row's form that fits; None if none does.

    By gradient caching, micro-batches leave half of what they could take to a larger batch.
    """
    micro = row.micro_batch
    if micro is not None:
        whole = step.largest(memory, None, row.checkpointed)
        micro = max(1, min(micro, whole.batch_size // 2)) if whole else 1
    return step.largest(memory, micro, row.checkpointed)


def fastest(rows: dict[str, Row], most: dict[str, Row | None], card: str | None) -> str:
    """Returns the form of the fastest step that fits, of all forms' largest ones if none does.

    Without a card it is the first form that fits, or the one of the largest batch.
    """
    fitting = {form: row for form, row in rows.items() if row.fits}
    if fitting and card is None:
        return next(iter(fitting))
    fitting = fitting or {form: row for form, row in most.items() if row} or rows
    if card is None:
        return max(fitting, key=lambda form: fitting[form].batch_size)
    return max(fitting, key=lambda form: images_per_s(fitting[form], card))


def images_per_s(row: Row, card: str) -> float:
    """Returns the images a second of a step."""
    return 1e3 * row.batch_size / step_ms(row.works, card)


def values_of(form: str, row: Row, most: Row | None, card: str | None) -> dict[str, Any]:
    """Returns a row of the plan as JSON. at_least: batches above most_pairs were not tried."""
    from simplclip.plan.step import MOST_PAIRS

    values: dict[str, Any] = {"form": form} | row._asdict()
    del values["works"]
    if card:
        rate = images_per_s(row, card)
        ms = 1e3 * row.batch_size / rate
        values |= {"ms": round(ms, 1), "images_per_s": round(rate, 1)}
    if most is None:
        return values | {"most_pairs": 0, "at_least": False}
    at_least = most.batch_size + (most.micro_batch or 1) > MOST_PAIRS
    return values | {"most_pairs": most.batch_size, "at_least": at_least}


def table(
    rows: dict[str, Row], most: dict[str, Row | None], memory: int, card: str | None
) -> Iterator[str]:
    """Yields the lines of a plan's table."""
    from simplclip.plan.step import usable

    yield f"{card or 'a GPU'}: {usable(memory) / GIB:.2f} of {memory / GIB:.2f} GiB are usable\n"
    times = f"{'ms':>10}{'images/s':>10}" if card else ""
    yield f"{'step':<21}{'at a time':>10}{'GiB':>9}  fits{times}{'most pairs':>13}"
    for form, row in rows.items():
        values = values_of(form, row, most[form], card)
        at_a_time = f"{row.micro_batch:,}" if row.micro_batch else "all"
        fits = "yes" if row.fits else "no"
        times = f"{values['ms']:>10,.0f}{values['images_per_s']:>10,.0f}" if card else ""
        pairs = f"{values['most_pairs']:,}{'+' if values['at_least'] else ''}"
        yield f"{form:<21}{at_a_time:>10}{row.peak / GIB:>9.2f}  {fits:<4}{times}{pairs:>13}"
    yield ""


def answers(
    form: str, row: Row | None, config: Config, card: str | None
) -> Iterator[tuple[str, str]]:
    """Yields (topic, text) for each line on the run of the `fastest` form, whose step is `row`."""
    if row is None:
        yield "fastest", "no step fits; a smaller model, or frozen parts, may"
        return
    if card:
        rate = images_per_s(row, card)
        images, length = run_images(config)
        hours = f"{images / rate / 3600:,.1f} hours" if images else "unknown hours"
        yield "fastest", f"{form}, {rate:,.0f} images/s; {length}: {hours}"
        yield "loader", f"{math.ceil(rate / DECODED)} workers, if each decodes {DECODED} images/s"
    micro = row.micro_batch or "null"
    yield "paste", f"--set data.batch_size={row.batch_size} --set data.micro_batch={micro}"
    if row.checkpointed != config.model.grad_checkpointing:
        yield "", f"--set model.grad_checkpointing={json.dumps(row.checkpointed)}"


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
