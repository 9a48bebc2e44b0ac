"""The command `simplclip caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.app import app
from simplclip.commands.options import (
    Decoders,
    Device,
    Pairs,
    Precision,
    SidecarFolder,
    Sidecars,
    check_data,
)


@app.command(
    short_help="Add synthetic captions to shards.",
    epilog="Example: simplclip caption 'shards/*.tar' --out captioned --checkpoint coca.pt --n 3",
)
def caption(
    source: Pairs,
    out: SidecarFolder,
    *,
    model: Annotated[str, typer.Option(help="An open_clip CoCa model.")] = "coca_ViT-B-32",
    checkpoint: Annotated[Path | None, typer.Option(help="File with its weights.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag of open_clip's weights to download instead.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Captions drawn for each image.")] = 3,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the most likely tokens with this share of the probability."),
    ] = 0.9,
    temperature: Annotated[
        float, typer.Option(help="Below 1: more likely captions; above 1: more varied ones.")
    ] = 1.0,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of a caption, including start and end.")
    ] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned at a time.")] = 32,
    workers: Decoders = 4,
    sidecars: Sidecars = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Write synthetic captions by a CoCa model into sidecars of the shards.

    Repeat the command to continue after a stop.
    """
    check_data(source, "source")
    from simplclip.common import ranks
    from simplclip.teacher import caption as captioning

    sampling = captioning.Sampling(n, top_p, temperature, max_tokens, seed)
    with ranks.join():
        summary = captioning.run(
            source,
            out,
            model,
            sampling,
            checkpoint=checkpoint,
            pretrained=pretrained,
            batch_size=batch_size,
            workers=workers,
            sidecars=sidecars or (),
            device=device,
            precision=precision,
        )
        if not ranks.first():
            return
    typer.echo(
        f"wrote {summary['written']} of {summary['shards']} sidecars to {summary['path']}: "
        f"{summary['samples']} pairs"
    )
    typer.echo(
        f"  {summary['captions']} new captions; dropped {summary['duplicate']} duplicates and "
        f"{summary['empty']} empty ones"
    )
