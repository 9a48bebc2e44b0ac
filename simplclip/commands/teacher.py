"""The command `simplclip teacher`."""

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
)


@app.command(
    epilog="Example: simplclip teacher 'shards/*.tar' --out taught "
    "--teacher open_clip:ViT-B-32 --checkpoint vit.pt",
)
def teacher(
    source: Pairs,
    out: SidecarFolder,
    teacher: Annotated[
        str,
        typer.Option(
            help="open_clip:NAME, open_clip:NAME/TAG (open_clip downloads it), or a model or run "
            "of this library."
        ),
    ],
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the teacher's weights.")
    ] = None,
    views: Annotated[
        int,
        typer.Option(
            min=0,
            help="Augmented views of each image, which training replays. 0: the image, not "
            "augmented.",
        ),
    ] = 0,
    config: Annotated[
        str | None, typer.Option(help="Config of the student, whose augmentation the views have.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples encoded at a time.")] = 64,
    workers: Decoders = 4,
    sidecars: Sidecars = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the views.")] = 0,
) -> None:
    """Write a teacher's features into sidecars of the shards.

    They are of images and captions; training reads them (data.sidecars).
    """
    from simplclip import teacher as teachers
    from simplclip.common import ranks

    with ranks.join():
        teachers.run(
            source,
            out,
            teacher,
            checkpoint=checkpoint,
            views=views,
            config=config,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            sidecars=sidecars or (),
            device=device,
            precision=precision,
        )
