"""The command line that the commands add themselves to, and the end of a command with an error."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from simplclip.commands.options import fail
from simplclip.common.errors import UserError

# On few cores, spinning OpenMP threads of two processes slow both processes down several times.
# OpenMP reads the variable when torch is loaded, which a command does when it runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# packages that another extra than `train` installs
EXTRAS = {
    "open_clip_train": "openclip",
    "peft": "lora",
    "safetensors": "export",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
}


class Commands(TyperGroup):
    """The group of commands.

    A UserError or OSError ends a command with one line and exit code 2; others keep a traceback.
    """

    def invoke(self, ctx):
        """Exits with 130 after Ctrl-C, else 2; click ends with 1 if the output's reader has ended.

        With SIMPLCLIP_DEBUG a UserError or OSError keeps its traceback, as other errors do.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            # for `simplclip[train]` pip takes the simplclip that is installed
            install = f"pip install 'simplclip[{EXTRAS.get(package, 'train')}]'"
            fail(f"this command needs the package {error.name}: {install}", 2)
        except (UserError, OSError) as error:
            if isinstance(error, BrokenPipeError) or os.environ.get("SIMPLCLIP_DEBUG"):
                raise
            fail(str(error), 2)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train simplified CLIP models (SiCLIP, arXiv 2411.14789) on one GPU or a CPU.",
)


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
    """Lets stdout and stderr write escapes for characters that they lack; runs before commands."""
    # one that the process has not (`2>&-`) writes to nowhere: the next file would get its number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
