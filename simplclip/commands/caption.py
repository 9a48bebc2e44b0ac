"""The command `simplclip caption`."""

from __future__ import annotations

from typing import Annotated

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Decoders, Pairs, SidecarFolder, Sidecars


@app.command(
    short_help="Add synthetic captions to shards.",
    epilog="Example: simplclip caption 'shards/*.tar' --out captioned "
    "--model Salesforce/blip-image-captioning-base --n 3",
)
def caption(
    source: Pairs,
    out: SidecarFolder,
    *,
    model: Annotated[
        str, typer.Option(help="Image-to-text model of transformers: a folder, or a hub's name.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="Question to a model that chats; else the start of each caption."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Captions drawn for each image.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a caption.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned at a time.")] = 32,
    workers: Decoders = 4,
    sidecars: Sidecars = None,
) -> None:
    """Write synthetic captions by a model of transformers into sidecars of the shards.

    Repeat the command to continue after a stop.
    """
    from simplclip.common import ranks
    from simplclip.teacher import caption as captioning

    drawing = {"n": n, "prompt": prompt or "", "max_tokens": max_tokens, "seed": seed}
    options = {"batch_size": batch_size, "workers": workers, "sidecars": sidecars or ()}
    with ranks.join():
        summary = captioning.run(source, out, model, drawing, **options)
        if ranks.first():
            typer.echo(f"wrote {summary['path']}: {summary['samples']:,} pairs")
