"""The command `simplclip export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or the folder of a run (its last.pt).")],
    out: Annotated[Path, typer.Option(help="Folder for the files and export.json.")],
    format_: Annotated[
        list[str] | None, typer.Option("--format", help="open_clip or onnx. May be repeated. Default: both.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Write a checkpoint as a folder that open_clip loads, and each tower as ONNX (checked by onnxruntime)."""
    from simplclip import export as exporter

    exporter.run(checkpoint, out, formats=format_ or exporter.FORMATS, force=force)
