"""The command `simplclip train`."""

from __future__ import annotations

import traceback
from typing import Annotated

import typer

from simplclip.commands.options import Overrides, Trust, fail
from simplclip.common.errors import UserError


def _config_help(wanted: bool) -> None:
    if wanted:
        from simplclip.train import config

        typer.echo(config.describe())
        raise typer.Exit


def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a built-in config such as siclip-s0.")],
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
