"""The command `simplclip plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Overrides
from simplclip.common.errors import InputError


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
    micro_batch: Annotated[
        str | None, typer.Option(help="data.micro_batch: a number, {image: N, text: M}, or auto for the largest that fits.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="open_clip", help="Also predict the original model with open_clip's own losses.")
    ] = None,
    teacher_width: Annotated[
        int | None, typer.Option(min=1, help="Width of the teacher's stored features, if the shards are not on this machine.")
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(min=1, help="Plan for one of so many ranks, which share data.batch_size, and for what they exchange."),
    ] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Pairs that a rank computes in a second, to compare the time of the exchange with.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; no GPU is needed.")] = "cuda",
    picture: Annotated[Path | None, typer.Option(help="Write a PNG of the memory during the step and by batch size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory of a training step without the card, the largest batches that fit, and advice."""
    if compare not in (None, "open_clip"):
        raise InputError(f"--compare: expected open_clip, got {compare!r}")
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device: expected cuda or cpu, got {device!r}")
    from simplclip.train import config as configs

    values = configs.load(config, [*(set_ or ()), *([f"data.micro_batch={micro_batch}"] if micro_batch else ())])
    from simplclip.memory import report

    if rate is not None and not rate > 0:
        raise InputError(f"--rate: expected pairs a second, above 0, got {rate}")
    of_plan = {"compare": compare is not None, "ranks": ranks, "rate": rate, "device": device, "teacher_width": teacher_width}
    report.run(values, memory, picture=picture, as_json=as_json, **of_plan)
