"""Options that several commands share, and the end of a command with an error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from simplclip.common.errors import InputError, visible

Pairs = Annotated[
    list[str],
    typer.Argument(
        metavar="PAIRS",
        help="Tars, by path, glob, brace pattern or URL; or a table, JSON or folder, which becomes "
        "shards first.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: a GPU if there is one.")]
Precision = Annotated[
    str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 if the device has it.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Processes that decode images. Default: one for each core, at most 8."
    ),
]
Last = Annotated[
    bool,
    typer.Option(
        "--last", help="Of a run's folder last.pt, the last step's weights, where it has a best.pt."
    ),
]
SidecarFolder = Annotated[
    Path,
    typer.Option(
        help="Folder for the sidecars; pairs other than tars become shards in OUT/shards."
    ),
]
Decoders = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: none.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the config, e.g. optim.lr=1e-3. May be repeated.",
    ),
]
Sidecars = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of sidecars to join to the shards first, e.g. with captions. May be repeated."
    ),
]


def fail(message: str, code: int) -> None:
    """Prints the message, of ranks but the first with their number, and raises typer.Exit(code)."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        message = f"rank {rank}: {message}"
    typer.echo(f"simplclip: {visible(message, keep=chr(10))}", err=True)
    raise typer.Exit(code)


def named_splits(items: list[str]) -> dict[str, Any]:
    r"""Returns split name -> data, of items NAME=DATA, or DATA alone, named after file or folder.

    A name has no characters of paths and patterns: / \ * ? [ ] { } # and =; pipe: begins DATA.
    Raises InputError for an empty item, or for a name that comes twice.
    """
    from simplclip.data.rows import split_of

    splits: dict[str, Any] = {}
    for item in items:
        match = re.fullmatch(r"(?:(?!pipe:)([^/\\*?\[\]{}#=]+)=)?(.+)", item, re.DOTALL)
        if not match:
            raise InputError(f"--data: expected NAME=DATA or DATA, got {item!r}")
        name = match[1]
        if not name:
            file, split = split_of(match[2])
            ending = r"[-_.]?[*?\[{]|([-_.]\d+)?\.tar|\.\w+$"
            name = re.split(ending, Path(file).name)[0] or "data"
            name += f"-{split}" if split else ""
        if name in splits:
            raise InputError(
                f"--data: expected different split names (--data NAME=DATA), got {name!r} twice"
            )
        splits[name] = match[2]
    return splits
