"""The command `simplclip`. Each command imports what it needs when it runs, so that --help needs the core only."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import Annotated

# Spinning OpenMP threads of two processes on few cores slow both several times; read when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer  # noqa: E402

from simplclip.common.command import expected_errors, fail  # noqa: E402
from simplclip.common.errors import InputError, UserError  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train simplified CLIP models (SiCLIP, arXiv 2411.14789) on one GPU or a CPU.",
)
data_app = typer.Typer(no_args_is_help=True, short_help="Build the data of the demo.", help="Build the data of the demo.")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the config, e.g. optim.lr=1e-3. May be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... or auto.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")]


def _version(wanted: bool) -> None:
    if wanted:
        import simplclip

        typer.echo(f"simplclip {simplclip.__version__}")
        raise typer.Exit


def _config_help(wanted: bool) -> None:
    if wanted:
        from simplclip.train import config

        typer.echo(config.describe())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command `simplclip`."""
    app()


@app.command(short_help="Show which backend serves each op here.", epilog="Example: simplclip doctor --why")
@expected_errors
def doctor(
    why: Annotated[bool, typer.Option("--why", help="Say for each op why the other backends do not serve it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Print what this installation can do: versions, CPU, GPU, and which backend serves each op."""
    import json

    import simplclip
    from simplclip import doctor as doctors

    report = simplclip.report()
    typer.echo(json.dumps(report, indent=2) if as_json else doctors.render(report, why))


@data_app.command(epilog="Example: simplclip data emoji --out data/emoji")
@expected_errors
def emoji(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")] = Path("data/emoji"),
    force: Annotated[bool, typer.Option("--force", help="Build anew where a build is there already.")] = False,
) -> None:
    """Build the built-in data: emoji of several vendors with their English names, as WebDataset shards."""
    from simplclip.demo import emoji as builder

    summary = builder.build(out, force=force)
    typer.echo(f"{'wrote' if summary['built'] else 'kept the complete build in'} {summary['path']}")
    for name, split in summary["splits"].items():
        typer.echo(f"  {name:<10} {split['samples']:>6} pairs of {', '.join(split['vendors'])}")


@app.command(short_help="Train a model.", epilog="Example: simplclip train siclip-s0 --set data.train=taught/*.tar --resume")
@expected_errors
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a built-in config such as siclip-tiny-emoji.")],
    set_: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from run.out/last.pt; start at step 0 if there is none.")
    ] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Cap the memory of the process, e.g. 24GiB or rtx-3090: a larger card then stands for a smaller one."
        ),
    ] = None,
    help_config: Annotated[
        bool,
        typer.Option(
            "--help-config",
            callback=_config_help,
            is_eager=True,
            help="Print every key of the config with its default and meaning.",
        ),
    ] = False,
) -> None:
    """Train a model. Ctrl-C finishes the running step, saves a checkpoint and exits; --resume continues from it."""
    from simplclip.train import config as configs

    values = configs.load(config, set_ or ())
    from simplclip import memory
    from simplclip import train as trainer

    limit = None if memory_limit is None else memory.parse_memory(memory_limit)
    try:
        trainer.run(values, resume=resume, memory_limit=limit, planner=memory)
    except trainer.Interrupted as stop:
        fail(str(stop), 130)
    except trainer.TrainingError as error:
        if error.__cause__ and not isinstance(error.__cause__, (UserError, OSError)):
            traceback.print_exception(error.__cause__)
        fail(str(error), 1)


@app.command(
    short_help="Zero-shot retrieval and classification of a checkpoint.",
    epilog="Example: simplclip evaluate runs/NAME --data test=shards/test-*.tar",
)
@expected_errors
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or the folder of a run (its last.pt).")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SHARDS", help="Split to evaluate on. May be repeated. Default: eval.splits of the run's config."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and pictures; default: beside the checkpoint.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help='Phrase around a label, e.g. "a photo of {}". May be repeated. Default: eval.templates of the config.'
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images or captions encoded at a time.")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Skip splits whose files do not exist, with a note.")
    ] = False,
) -> None:
    """Zero-shot retrieval and classification of a checkpoint: a table, JSON, and pictures of what it finds."""
    splits = _named_splits(data or [])
    from simplclip import evaluate as evaluation

    evaluation.run(
        checkpoint,
        splits or None,
        out=out,
        templates=template or None,
        batch_size=batch_size,
        device=device,
        precision=precision,
        skip_missing=skip_missing,
    )


@app.command(
    short_help="Predict the memory of a training step.",
    epilog="Example: simplclip plan siclip-s0 --memory rtx-3090 --compare open_clip",
)
@expected_errors
def plan(
    config: Annotated[str, typer.Argument(help="YAML file or name of a built-in config, as in train.")],
    memory: Annotated[
        str, typer.Option(help="Memory of the card: a size such as 24GiB, or a name: rtx-3090, rtx-4090, a100-40.")
    ],
    set_: Overrides = None,
    micro_batch: Annotated[
        str | None, typer.Option(help="data.micro_batch: a number, or auto for the largest that fits.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="open_clip", help="The model's original with open_clip's own losses beside it.")
    ] = None,
    teacher_width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the teacher's stored features, where the shards are not on this machine."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; no GPU is needed.")] = "cuda",
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG with the memory over the step and over the batch size.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory of a training step, without the card, with the largest batches and advice."""
    if compare not in (None, "open_clip"):
        raise InputError(f"--compare: expected open_clip, got {compare!r}")
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device: expected cuda or cpu, got {device!r}")
    from simplclip.train import config as configs

    values = configs.load(config, [*(set_ or ()), *([f"data.micro_batch={micro_batch}"] if micro_batch else ())])
    from simplclip.memory import command

    command.run(
        values,
        memory,
        device=device,
        teacher_width=teacher_width,
        compare=compare is not None,
        picture=picture,
        as_json=as_json,
    )


@app.command(
    short_help="Train one student with one part more at a time.",
    epilog="Example: simplclip ablate siclip-lite0-emoji --out runs/ablation --seeds 3",
)
@expected_errors
def ablate(
    config: Annotated[str, typer.Argument(help="YAML file or name of a built-in config with every part on.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, ablation.csv and ablation.png.")],
    set_: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    start: Annotated[list[str] | None, typer.Option(help="scratch or inherited. May be repeated. Default: both.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each with its share of the CPU threads.")] = 1,
) -> None:
    """Train one student with one part more at a time. Repeat the command to go on after a stop."""
    from simplclip import ablate as ablation

    path = ablation.run(config, out, overrides=set_ or (), seeds=seeds, starts=start or ablation.STARTS, jobs=jobs)
    typer.echo(f"wrote {path} and {path.with_suffix('.png')}")


@app.command(
    short_help="Write weights for open_clip, safetensors and ONNX.", epilog="Example: simplclip export runs/NAME --out export"
)
@expected_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or the folder of a run (its last.pt).")],
    out: Annotated[Path, typer.Option(help="Folder for the files and export.json.")],
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", help="open_clip, safetensors or onnx. May be repeated. Default: all."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there already.")] = False,
) -> None:
    """Write a checkpoint's weights for open_clip, as safetensors, and each tower as ONNX, checked by onnxruntime."""
    from simplclip import export as exporter

    exporter.run(checkpoint, out, formats=format_ or exporter.FORMATS, force=force)


@app.command(
    short_help="Add synthetic captions to shards.",
    epilog="Example: simplclip caption shards/*.tar --out captioned --checkpoint coca.pt --n 3",
)
@expected_errors
def caption(
    shards: Annotated[list[str], typer.Argument(help="Shards to caption: paths, globs or brace patterns.")],
    out: Annotated[Path, typer.Option(help="Folder for the new shards.")],
    model: Annotated[str, typer.Option(help="An open_clip CoCa model.")] = "coca_ViT-B-32",
    checkpoint: Annotated[Path | None, typer.Option(help="File with its weights.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of weights to download, instead.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Captions drawn for each image.")] = 3,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this share of the probability.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Below 1: likelier captions; above 1: more varied ones.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a caption, start and end included.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Write new shards with synthetic captions by a CoCa model. Repeat the command to go on after a stop."""
    from simplclip import caption as captioning

    summary = captioning.run(
        shards,
        out,
        model,
        checkpoint=checkpoint,
        pretrained=pretrained,
        n=n,
        top_p=top_p,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    typer.echo(f"wrote {summary['written']} of {summary['shards']} shards to {summary['path']}: {summary['samples']} pairs")
    typer.echo("  {captions} new captions; dropped {duplicate} duplicates and {empty} empty ones".format_map(summary))


@app.command(
    short_help="Write a teacher's features into new shards.",
    epilog="Example: simplclip teacher shards/*.tar --out taught --teacher open_clip:ViT-B-32 --checkpoint vit.pt",
)
@expected_errors
def teacher(
    shards: Annotated[list[str], typer.Argument(help="Shards of image-text pairs: paths, globs or brace expressions.")],
    out: Annotated[Path, typer.Option(help="Folder for the new shards.")],
    teacher: Annotated[
        str,
        typer.Option(help="builtin, open_clip:NAME, open_clip:NAME/TAG (open_clip downloads it), or a model of ours."),
    ] = "builtin",
    checkpoint: Annotated[Path | None, typer.Option(help="File with the teacher's weights.")] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="The built-in teacher's heads; trained on the shards and saved there if it does not exist. "
            "Default: OUT.heads.safetensors."
        ),
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]SHARDS", help="Measure the teacher's retrieval on this split. May be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the training of the heads.")] = 0,
) -> None:
    """Compute a teacher's features of images and captions once, and write them into new shards."""
    splits = _named_splits(evaluate or [])
    from simplclip.teacher import command

    command.run(
        shards,
        out,
        name=teacher,
        checkpoint=checkpoint,
        heads_file=heads,
        splits=splits,
        batch_size=batch_size,
        device=device,
        precision=precision,
        seed=seed,
    )


def _named_splits(items: list[str]) -> dict[str, str]:
    """NAME=SHARDS, or SHARDS alone: then the name is the file's up to its number or wildcard."""
    splits: dict[str, str] = {}
    for item in items:
        match = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", item, re.DOTALL)
        if not match:
            raise InputError(f"--data: expected NAME=SHARDS or SHARDS, got {item!r}")
        name = match[1] or re.split(r"[-_.]?[*?\[{\d]|\.tar", Path(match[2]).name)[0] or "data"
        if name in splits:
            raise InputError(f"--data: expected different split names (--data NAME=SHARDS), got {name!r} twice")
        splits[name] = match[2]
    return splits
