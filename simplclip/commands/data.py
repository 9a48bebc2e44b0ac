"""`simplclip data`: a report on pairs, shards of pairs, indices of shards, and smaller images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simplclip.commands.options import Pairs
from simplclip.common.errors import visible

app = typer.Typer(
    no_args_is_help=True,
    short_help="Make, index, inspect and shrink shards.",
    help="Make, index, inspect and shrink shards.",
)
Shards = Annotated[list[str], typer.Argument(help="Shards of image-text pairs: paths, globs or brace patterns.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one for each core.")]


@app.command(epilog="Example: simplclip data index 'shards/*.tar' --decode")
def index(
    shards: Shards,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the indices, which SIMPLCLIP_INDEX names to other commands then. Default: beside the shards."
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, to find damage behind the header. Takes hours.")
    ] = False,
    workers: Workers = None,
) -> None:
    """Write an index beside each shard (NAME.tar.index.npz): counts, sizes, and what lies where. Finished ones are kept."""
    from simplclip.data import build_index

    found = build_index.run(shards, out=out, decoded=decode, workers=workers)
    kept = found["shards"] - found["written"] - len(found["unreadable"])
    typer.echo(
        f"{found['samples']:,} samples in {found['shards']:,} shards; wrote {found['written']:,} indices, kept {kept:,}"
    )
    for reason, count in found["broken"].counts.most_common():
        typer.echo(f"  {count:,} {reason} (first: {found['broken'].examples[reason]})")
    _unreadable(found["unreadable"])
    if out is not None:
        typer.echo(f"For other commands: export SIMPLCLIP_INDEX={out.resolve()}")


@app.command(epilog="Example: simplclip data pack pairs.csv --out shards")
def pack(
    source: Pairs,
    out: Annotated[Path, typer.Option(help="Folder for the shards, which appears when they are complete.")],
) -> None:
    """Copy pairs of any form into shards, with their images as they are."""
    from simplclip.data import pack as packing

    packing.pack(source, out)


@app.command(epilog="Example: simplclip data report 'shards/*.tar' --out report")
def report(
    source: Pairs,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.png.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Images decoded to measure the rate of one core; 0 for none.")] = 512,
    size: Annotated[int, typer.Option(min=1, help="Side of the images that training makes.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the epoch's length.")] = 1024,
    workers: Workers = None,
) -> None:
    """Show what pairs there are: images, captions, sizes, broken samples, and how long an epoch takes to decode."""
    from rich.console import Console

    from simplclip.data import report as reports

    found = reports.run(source, out=out, sample=sample, size=size, batch_size=batch_size, workers=workers)
    console = Console(highlight=False)
    for table in reports.tables(found):
        console.print(table)
    _unreadable(found["unreadable"])
    if out is not None:
        typer.echo(f"wrote {out / 'report.json'} and {out / 'report.png'}")


@app.command(epilog="Example: simplclip data shrink 'shards/*.tar' --out small --short 288")
def shrink(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for the new shards.")],
    short: Annotated[int, typer.Option(min=1, help="Most pixels of an image's short side.")] = 288,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the encoder.")] = 90,
    workers: Workers = None,
) -> None:
    """Write new shards with smaller images, as JPEG; all else stays. Repeat the command to continue after a stop."""
    from rich.filesize import decimal

    from simplclip.data import shrink as shrinking

    summary = shrinking.run(shards, out, short=short, quality=quality, workers=workers)
    before, after = summary["bytes"]
    typer.echo(
        f"wrote {summary['written']} of {summary['shards']} shards to {summary['path']}: {summary['samples']:,} samples"
    )
    share = f" ({after / before:.0%})" if before else ""
    typer.echo(f"  bytes      {decimal(before)} before, {decimal(after)} after{share}")


def _unreadable(found: dict[str, str]) -> None:
    for reason in found.values():
        typer.echo(f"  not read: {visible(reason)}", err=True)
