"""`simplclip data`: what shards hold, their indices, smaller images, and the data of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simplclip.common.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    short_help="Index, inspect and shrink shards; build the demo's data.",
    help="Index, inspect and shrink shards, and build the data of the demo.",
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


@app.command(epilog="Example: simplclip data report 'shards/*.tar' --out report")
def report(
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.png.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Images decoded to measure the rate of one core; 0 for none.")] = 512,
    size: Annotated[int, typer.Option(min=1, help="Side of the images that training makes.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the epoch's length.")] = 1024,
    workers: Workers = None,
) -> None:
    """Show what shards hold: images, captions, sizes, broken samples, and how long an epoch takes to decode."""
    from rich.console import Console

    from simplclip.data import report as reports

    found = reports.run(shards, out=out, sample=sample, size=size, batch_size=batch_size, workers=workers)
    console = Console(highlight=False)
    for table in _tables(found):
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


@app.command(epilog="Example: simplclip data emoji --out data/emoji")
def emoji(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")] = Path("data/emoji"),
    swap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training pairs whose captions are swapped, for noisy pairs.")
    ] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing build.")] = False,
) -> None:
    """Build the built-in data: emoji of several vendors with their English names, as WebDataset shards."""
    from simplclip.demo import emoji as builder

    summary = builder.build(out, swap=swap, force=force)
    typer.echo(f"{'wrote' if summary['built'] else 'kept the complete build in'} {summary['path']}")
    for name, split in summary["splits"].items():
        typer.echo(f"  {name:<10} {split['samples']:>6} pairs of {', '.join(split['vendors'])}")
    if swap:
        typer.echo(f"  {summary['swapped']} pairs of train ({swap:g}) have each other's captions")


def _unreadable(found: dict[str, str]) -> None:
    for reason in found.values():
        typer.echo(f"  not read: {visible(reason)}", err=True)


def _tables(found: dict[str, Any]) -> list[Table]:
    from rich.filesize import decimal
    from rich.markup import escape

    from simplclip.common.tables import table
    from simplclip.data.report import MEASURES

    def first(name: str) -> str:
        return escape(visible(name))

    epoch, decoding, twice = found["epoch"], found["decoding"], found["duplicate_keys"]
    formats = ", ".join(f"{count:,} {name}" for name, count in found["formats"].items())
    about = [
        ("samples", f"{found['samples']:,} in {found['shards']:,} shards, {decimal(found['bytes'])}"),
        ("images", f"{formats or 'none'}, {decimal(found['image_bytes'])}"),
        ("epoch", f"{epoch['batches']:,} batches of {epoch['batch_size']:,}"),
        ("repeated keys", f"{twice['in_a_shard']:,} within a shard, {twice['in_all_shards']:,} in all"),
        ("index", f"of {found['indexed']:,} shards; every image decoded of {found['decoded']:,} samples"),
    ]
    if decoding and (rate := decoding["images_per_second"]):
        hours = found["samples"] / rate / 3600
        about += [
            ("decoding", f"{rate:,.0f} images/s on one core ({decoding['images']:,}, to {decoding['size']} pixels)"),
            ("", f"{hours:,.3g} core hours an epoch; {1000 / rate:.2g} cores for every 1,000 images/s that a card takes"),
        ]
    for shard, (said, there) in found["img2dataset"].items():
        about.append(("img2dataset", f"{first(shard)}: its stats say {said:,} images, there are {there:,}"))
    quantiles = [
        (f"{name} ({MEASURES[name]})" if MEASURES[name] else name, *(f"{value:,}" for value in values.values()))
        for name, values in found["quantiles"].items()
    ]
    broken = [(reason, f"{count:,}", first(place)) for reason, (count, place) in found["broken"].items()]
    if decoding and found["decoded"] < found["samples"]:
        reasons = decoding["broken"].items()
        broken += [(f"{reason}, of those decoded", f"{count:,}", first(place)) for reason, (count, place) in reasons]
    shown = [table(("data", ""), about)]
    if quantiles:
        shown.append(table(("of each", *next(iter(found["quantiles"].values()))), quantiles, numbers=True))
    return [*shown, *([table(("broken", "samples", "the first"), broken)] if broken else [])]
