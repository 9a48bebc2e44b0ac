"""The command `simplclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Device, Precision, Trust, Workers, named_splits


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, folder of a run or of an export, open_clip:NAME/TAG, open_clip:NAME/FILE, "
            "or mobileclip-s0/FILE.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DATA",
            help="All that training reads: shards, tables, JSON of Karpathy's or COCO's kind, folders. "
            "DATA#SPLIT names a split other than test. May be repeated. Default: eval.splits of the first model's config.",
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and pictures. Default: that of the first model.")
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--templates",
            help='Phrase around a label, e.g. "a photo of {}"; openai or simple for open_clip\'s lists; or a file. May be '
            "repeated. Default: those of the data, or eval.templates of the config.",
        ),
    ] = None,
    classnames: Annotated[
        str | None,
        typer.Option(help="imagenet for open_clip's list, or a file: a name a line, or JSON. Default: those of the data."),
    ] = None,
    captions: Annotated[
        int | None,
        typer.Option(min=0, help="First captions of an image that count; 0: all. Default: all, but one of a json in shards."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images that a JSON or table names. Default: that of the file.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Folder that keeps the features as .npy files.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or captions encoded at a time.")] = 64,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Skip splits whose files do not exist, and print a note.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Evaluate models by zero-shot retrieval and classification; write a table, JSON and pictures of the results."""
    splits = named_splits(data or [])
    from simplclip import evaluation
    from simplclip.common import ranks

    what = {"templates": templates or None, "classnames": classnames, "captions": captions, "images": images}
    what["trust"] = trust
    how = {"batch_size": batch_size, "workers": workers, "device": device, "precision": precision}
    with ranks.joined():
        evaluation.evaluate(models, splits or None, out=out, features=features, skip_missing=skip_missing, **what, **how)
