"""The command `simplclip share`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Device, Precision, Workers


def share(
    model: Annotated[
        str,
        typer.Argument(
            help="A pretrained model: checkpoint, folder of a run or of an export, open_clip:NAME/TAG, or a name with "
            "--checkpoint, such as mobileclip-s0 or open_clip:ViT-B-32."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Shards of image-text pairs, or what else evaluate takes; the first samples are used.")
    ],
    *,
    checkpoint: Annotated[Path | None, typer.Option(help="File with the weights of the model.")] = None,
    tower: Annotated[str, typer.Option(help="text, image or both.")] = "both",
    samples: Annotated[int, typer.Option(min=1, help="Images and captions to measure.")] = 256,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Parameters of a tower: a number such as 9.78M, or a percentage of the tower as it is, such as 80%. Prints "
            "groups of blocks that share weights within it."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for share.json and share.png.")] = Path("share"),
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 8,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Measure how alike the blocks of a pretrained model are, and propose which of them may share weights.

    The table has, for neighbouring blocks, the Jensen-Shannon divergence of their attention maps (0 to ln 2 = 0.69 nats) and
    the cosines of their updates and outputs; share.png and share.json have all pairs.
    """
    from simplclip import sharing

    how = {"batch_size": batch_size, "workers": workers, "device": device, "precision": precision}
    what = {"checkpoint": checkpoint, "tower": tower, "samples": samples, "budget": budget, "out": out}
    sharing.run(model, data, **what, **how)
