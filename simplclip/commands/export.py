"""The command `simplclip export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Last
from simplclip.models.naming import Form


@app.command(epilog="Example: simplclip export runs/NAME --out export")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, or the folder of a run (its best.pt, else last.pt).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files and export.json.")],
    last: Last = False,
    to: Annotated[
        Form,
        typer.Option(help="transformers: a CLIPModel or SiglipModel, of a ViT not simplified."),
    ] = "open_clip",
    blend: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            min=0,
            max=1,
            help="Of a run: write weights between those from which it started, 0, and its own, 1.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Write a checkpoint as a folder that open_clip or transformers loads.

    Prints the lines that load it.
    """
    from simplclip import export as exporter

    exporter.run(checkpoint, out, to=to, force=force, blend=blend, last=last)
