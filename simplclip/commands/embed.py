"""The command `simplclip embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simplclip.commands.options import Device, Precision, Workers, pairs
from simplclip.common.errors import InputError, visible


def embed(
    source: Annotated[
        list[Any] | None, typer.Argument(parser=pairs, help="Images, as for training; with --find a file of features.")
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="As in evaluate. With --find by default the features' own.")] = None,
    out: Annotated[Path | None, typer.Option(help="NAME.npz.")] = None,
    texts: Annotated[Path | None, typer.Option(help="In place of images: a file with a text a line.")] = None,
    find: Annotated[list[str] | None, typer.Option(help="A text, or the path of an image. May be repeated.")] = None,
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
    from simplclip.common import ranks

    what = None if not source else source[0] if len(source) == 1 else source
    options = {"dtype": dtype, "batch_size": batch_size, "workers": workers, "device": device, "precision": precision}
    with ranks.joined():
        found = embedding.embed(what, out, model=model, texts=texts, **options)
        if not ranks.first():
            return
    typer.echo(f"wrote {out}: {found['count']:,} {found['tower']}s, {found['width']} {dtype} numbers each")
    if found["skipped"].counts:
        typer.echo(f"  {found['skipped']}")


def _search(features: str, queries: list[str], model: str | None, top: int, picture: Path | None, device: str) -> None:
    from rich import print as show
    from rich.text import Text

    from simplclip import embedding
    from simplclip.common.tables import table

    stored = embedding.Stored(features)
    found = embedding.find(stored, queries, model=model, top=top, device=device)
    for query, hits in found.items():
        rows = [(f"{hit.score:.3f}", hit.key, hit.caption, hit.image_path or hit.shard) for hit in hits]
        cells = [[Text(visible(cell), overflow="fold") for cell in row] for row in rows]
        show(Text(visible(query), "bold"), table(("score", "key", "caption", "place"), cells))
    if picture:
        typer.echo(f"wrote {embedding.picture(picture, found, stored.about)}")
