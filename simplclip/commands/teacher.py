"""The command `simplclip teacher`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Device, Pairs, Precision, Sidecars, named_splits
from simplclip.common.errors import InputError


def teacher(
    source: Pairs,
    out: Annotated[Path, typer.Option(help="Folder for the sidecars; pairs other than local tars are copied to OUT.shards.")],
    *,
    teacher: Annotated[
        list[str],
        typer.Option(
            help="open_clip:NAME, open_clip:NAME/TAG (open_clip downloads it), or a model or run of this library. "
            "Several are an ensemble."
        ),
    ],
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="File with the teacher's weights; one for each of several teachers, or none.")
    ] = None,
    views: Annotated[
        int, typer.Option(min=0, help="Augmented views of each image, which training replays. 0: the image, not augmented.")
    ] = 0,
    config: Annotated[str | None, typer.Option(help="Config of the student, whose augmentation the views have.")] = None,
    model: Annotated[str | None, typer.Option(help="Or model of the student.")] = None,
    augment: Annotated[
        str | None, typer.Option(help="Or augmentation, as data.augment. Default: that of the model, else open_clip's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored features: fp16 or bf16.")] = "fp16",
    evaluate: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DATA", help="Measure the teacher's retrieval on this split. May be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples encoded at a time.")] = 64,
    sidecars: Sidecars = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the views.")] = 0,
) -> None:
    """Write a teacher's features of images and captions into sidecars of the shards, which training reads (data.sidecars)."""
    splits = named_splits(evaluate or [], "--evaluate")
    if not views and (config or model or augment):
        raise InputError("--config, --model, --augment: expected --views beside them, got none")
    from simplclip import teacher as teachers
    from simplclip.common import ranks

    seen = teachers.Views(teachers.student_transform(config, model, augment), views, seed) if views else None
    what = {"views": seen, "dtype": dtype, "sidecars": sidecars or ()}
    files = {"checkpoint": checkpoint, "splits": splits}
    hardware = {"batch_size": batch_size, "device": device, "precision": precision}
    with ranks.joined():
        teachers.run(source, out, name=teacher, **what, **files, **hardware)
