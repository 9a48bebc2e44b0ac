"""The command `simplclip embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simplclip.commands.options import Device, Precision, Workers
from simplclip.common.errors import InputError, visible

if TYPE_CHECKING:
    from rich.table import Table

    from simplclip.embedding import Hit


def embed(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images: shards, URLs, a folder, image files, a table (.csv, .tsv, .parquet), a list of files (.txt), or a "
            "JSON; with --find the features."
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="As in evaluate: checkpoint, run, export, open_clip:NAME/TAG. With --find by default the features'."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="NAME.npz, NAME.parquet, or a new folder in clip-retrieval's layout.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="In place of images: a file with a text a line.")] = None,
    find: Annotated[
        list[str] | None, typer.Option(metavar="QUERY", help="A text, or the path of an image. May be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Hits of each query.")] = 10,
    picture: Annotated[Path | None, typer.Option(help="PNG of the hits.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored features: fp16 or fp32.")] = "fp16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images or texts encoded at a time.")] = 64,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Write the features of images or texts into a file; with --find, search such a file by text or image."""
    if find:
        if out or texts or len(source or ()) != 1:
            raise InputError("--find: expected one file of features, without --out and --texts, got something else")
        _search(source[0], find, model, top, picture, device)
        return
    if picture:
        raise InputError("--picture: expected --find beside it, got none")
    if out is None or model is None:
        raise InputError("embed: expected --model and --out, or --find, got neither")
    from simplclip import embedding

    what = None if not source else source[0] if len(source) == 1 else source
    options = {"dtype": dtype, "batch_size": batch_size, "workers": workers, "device": device, "precision": precision}
    found = embedding.embed(what, out, model=model, texts=texts, **options)
    unit = "images" if found["tower"] == "image" else "texts"
    typer.echo(f"wrote {found['path']}: {found['count']:,} {unit}, {found['width']} {found['dtype']} numbers each")
    if found["skipped"].counts:
        typer.echo(f"  {found['skipped']}")


def _search(features: str, queries: list[str], model: str | None, top: int, picture: Path | None, device: str) -> None:
    from rich.console import Console

    from simplclip import embedding

    stored = embedding.Stored(features)
    found = embedding.find(stored, queries, model=model, top=top, device=device)
    console = Console(highlight=False)
    for query, hits in found.items():
        console.print(_table(query, hits))
    if picture:
        typer.echo(f"wrote {embedding.picture(picture, found, stored.about)}")


def _table(query: str, hits: list[Hit]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title=Text(visible(query), "bold"), title_justify="left"
    )
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("key", overflow="fold")
    table.add_column("caption", overflow="fold")
    if any(hit.place for hit in hits):
        table.add_column("place", overflow="fold")
    for hit in hits:
        place = hit.image_path or hit.shard
        cells = (hit.key, hit.caption, *([place] if len(table.columns) == 4 else ()))
        table.add_row(f"{hit.score:.3f}", *(Text(visible(cell)) for cell in cells))
    return table
