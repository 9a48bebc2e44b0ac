"""The command `simplclip evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Device, Last, Precision, Workers, named_splits
from simplclip.common.errors import InputError


@app.command(
    short_help="Evaluate models by retrieval and classification.",
    epilog="Example: simplclip evaluate runs/NAME open_clip:ViT-B-32/laion.pt "
    "--data test='shards/test-*.tar'",
)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, folder of a run or of an export, open_clip:NAME/TAG, "
            "open_clip:NAME/FILE, mobileclip-s0/FILE.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DATA",
            help="Shards, a table, JSON or folder as `simplclip data pack` takes them, or "
            "clip-benchmark's layout (its split test, or a split's folder). May be repeated. "
            "Default: eval.splits in the config.yaml beside the first model; --blend takes both.",
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for evaluation.json and pictures. Default: that of the first model."
        ),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--templates",
            help='Phrase around a label, e.g. "a photo of {}"; openai or simple for '
            "open_clip's lists; or a file with a phrase a line. May be repeated. Default: those of "
            "the data, or eval.templates of the first model's config.",
        ),
    ] = None,
    classnames: Annotated[
        str | None,
        typer.Option(
            help="imagenet for open_clip's list, or a file with a name a line. Default: the data's."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of the images that tables or JSON files name. Default: the file's own."
        ),
    ] = None,
    captions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First captions of an image that count; 0: all. Default: all, but one of a json "
            "in shards.",
        ),
    ] = None,
    last: Last = False,
    blend: Annotated[
        bool,
        typer.Option(
            "--blend",
            help="Evaluate weights between those from which the run started and its own (WiSE-FT); "
            "write blend.json.",
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images or captions encoded at a time.")
    ] = 64,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Evaluate models by zero-shot retrieval and classification; write a table, JSON and pictures
    of the results.
    """
    splits = named_splits(data or [])
    if blend or not splits:  # a blend is judged by the run's own data too
        splits = splits_of(models[0]) | splits
    if images is not None:
        splits = {name: {"shards": split, "images": images} for name, split in splits.items()}
    from simplclip import evaluation
    from simplclip.common import ranks

    settings = evaluation.Settings(
        templates=templates or None,
        classnames=classnames,
        captions=captions,
        batch_size=batch_size,
        workers=workers,
        last=last,
        device=device,
        precision=precision,
    )
    with ranks.join():
        if not blend:
            evaluation.evaluate(models, splits, settings, out=out)
            return
        from simplclip.models.trained import read_checkpoint
        from simplclip.train.setup import load_start

        encoder = settings.load(models[0])
        if encoder.config is None or models[1:]:
            raise InputError(f"--blend: expected one run or checkpoint, got {', '.join(models)}")
        start = load_start(encoder.source, read_checkpoint(encoder.source))
        evaluation.evaluate_blend(encoder, start, splits, settings, out=out)


def splits_of(model: str) -> dict[str, Any]:
    """Returns a run's eval.splits and the share of eval.hold_out; {} without a config.yaml.

    model: the folder of a run, or a checkpoint in it. Since it may come from elsewhere, its splits
    may be local files alone: raises InputError for commands and URLs.
    """
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    file = folder / "config.yaml"
    if not (Path(model).exists() and file.is_file()):
        return {}
    from simplclip.train import config

    try:
        settings = config.load(file)
    except config.ConfigError as error:
        raise InputError(
            f"data: expected --data, or a config of this version, got {file}: {error}"
        ) from None
    splits = settings.eval.splits | settings.held_out
    for name, split in splits.items():
        remote = re.search(r'"(pipe:.*?|[^"]*://.*?)"', json.dumps(split))
        if remote:
            raise InputError(
                f"data: expected local files in the eval.splits of {file}, got {remote[1]!r}; "
                f"name the data by --data {name}=DATA"
            )
    return splits
