"""The command `simplclip share`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Device


def share(
    model: Annotated[str, typer.Argument(help="As in evaluate, or a name such as mobileclip-s0 with --checkpoint.")],
    data: Annotated[str, typer.Option(help="Image-text pairs, as in evaluate; the first samples are used.")],
    *,
    checkpoint: Annotated[Path | None, typer.Option(help="File with the weights of the model.")] = None,
    tower: Annotated[str, typer.Option(help="text or image.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Images and captions to measure.")] = 256,
    budget: Annotated[str | None, typer.Option(help="Parameters to keep within, as a number or as 80% of the tower.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for share.json and share.png.")] = Path("share"),
    device: Device = "auto",
) -> None:
    """Measure how alike the blocks of a pretrained model are, and propose which of them may share weights.

    The measure is the Jensen-Shannon divergence of their attention maps, from 0 for equal maps to ln 2 = 0.69 nats. The table
    has it for neighbouring blocks, share.png and share.json for all pairs.
    """
    from simplclip import sharing

    how = {"samples": samples, "budget": budget, "out": out, "device": device}
    sharing.run(model, data, checkpoint=checkpoint, tower=tower, **how)
