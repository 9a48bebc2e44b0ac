"""The command `simplclip export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or the folder of a run (its last.pt).")],
    out: Annotated[Path, typer.Option(help="Folder for the files and export.json.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Write a checkpoint as a folder with safetensors that open_clip loads, and print the lines that load it."""
    from simplclip.models.sources import check_export, check_weights

    check_export(out, force)
    check_weights(checkpoint, "checkpoint", ("last.pt",))
    from simplclip import export as exporter

    exporter.run(checkpoint, out, force=force)
