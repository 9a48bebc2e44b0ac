"""`simplclip data pack`: shards of pairs in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.app import app

data = typer.Typer(no_args_is_help=True, help="Make shards of pairs.")
app.add_typer(data, name="data")


@data.callback()
def _group() -> None:
    """Keeps `pack` a command of its own: typer would make it the group itself."""


@data.command(epilog="Example: simplclip data pack photos --out shards")
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A table of images and captions (.csv, .tsv, .jsonl, .parquet); a JSON file of "
            "Karpathy's or COCO's kind (FILE.json#SPLIT); or a folder of images, with KEY.txt or "
            "KEY.json beside KEY.jpg, with metadata.jsonl or metadata.csv, or with a folder for "
            "each class."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    image_key: Annotated[
        str | None,
        typer.Option(help="Column of the images. Default: filepath, path, image ..."),
    ] = None,
    caption_key: Annotated[
        str | None, typer.Option(help="Column of the captions. Default: caption, title, text ...")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of the images. Default: that of the table.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes. Default: one for each core.")
    ] = None,
) -> None:
    """Make shards of a table, a JSON file or a folder; the images stay as they are.

    Repeat it to continue after a stop.
    """
    from simplclip.data import pack as packing
    from simplclip.data.rows import Options

    options = Options(image_key=image_key, caption_key=caption_key, images=images)
    packing.pack(source, out, options, workers=workers)
