"""The command `simplclip plan`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from simplclip.commands.options import Overrides


def plan(
    config: Annotated[str, typer.Argument(help="YAML file or name of a built-in config, as in train.")],
    memory: Annotated[
        str,
        typer.Option(
            "--memory", "--card", help="A card, rtx-3090 or a100-40 ..., or its memory as on the box: 12GB, which is 12GiB."
        ),
    ],
    *,
    set_: Overrides = None,
    teacher_width: Annotated[
        int | None, typer.Option(min=1, help="Width of the teacher's stored features, if the shards are not on this machine.")
    ] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="No GPU is needed.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory of a training step without the card, and the largest batches that fit."""
    from simplclip.train import config as configs

    values = configs.load(config, set_ or ())
    from simplclip.plan import report

    report.run(values, memory, device=device, teacher_width=teacher_width, as_json=as_json)
