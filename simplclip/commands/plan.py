"""The command `simplclip plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Overrides
from simplclip.common.errors import InputError

# Required keys, which a config or a model that is only planned may lack.
REQUIRED = {"data": {"train": "planned/*.tar"}, "run": {"out": "runs/planned"}}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}  # of a number of pairs


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
    """Predict the memory and time of a training step, and the largest batches that fit.

    No GPU is needed.
    """
    from simplclip.models.model_names import check_name
    from simplclip.plan.cards import named, parse_memory
    from simplclip.train import config as configs

    if (memory is None) == (cards is None):
        raise InputError("--card: expected a card or the size of its memory, or --cards all")
    if cards is not None and as_json:
        raise InputError("--cards: expected no --json, got it")
    count = parse_count(pairs)
    values = configs.from_dict(configs.override(read_planned_config(config), set_ or ()))
    check_name(values.model.name, "model.name")
    size = None if memory is None else parse_memory(memory)
    import torch

    if torch.version.cuda is None:
        raise InputError(
            f"torch: expected a build with CUDA, which a plan needs (the card itself is not "
            f"needed), got {torch.__version__}"
        )
    from simplclip.plan import report

    if memory is None or size is None:
        report.run_all(values, teacher_width=teacher_width, pairs=count)
        return
    report.run(
        values, size, named(memory), teacher_width=teacher_width, pairs=count, as_json=as_json
    )


def read_planned_config(source: str) -> dict[str, Any]:
    """Returns the values of a config, or of a model's with defaults, with REQUIRED ones added."""
    from simplclip.models import presets
    from simplclip.models.model_names import PLAIN
    from simplclip.train import config as configs

    is_config = Path(source).is_file() or source in presets.configs()
    if not is_config and (source in presets.NAMES or source.startswith(PLAIN)):
        return {"model": {"name": source}, **REQUIRED}
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
