"""The command `simplclip train`."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from simplclip.commands.options import Overrides, check_data, fail
from simplclip.common.errors import InputError, UserError


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

    first = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:  # torch reads it when it is imported: else each rank warns of a search for unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        values = configs.load(config, set_ or ())
        check_sources(values)
    except (UserError, OSError) as error:
        if first:
            raise
        raise typer.Exit(2) from error

    from simplclip import train as trainer

    if values.data.micro_batch == "auto":
        values = _with_micro_batch(values)
    try:
        trainer.run(values, resume=resume)
    except trainer.Interrupted as stop:
        fail(str(stop), 130)
    except trainer.TrainingError as error:
        if error.__cause__ and not isinstance(error.__cause__, (UserError, OSError)):
            traceback.print_exception(error.__cause__)
        fail(str(error), 1)


def check_sources(config: Any) -> None:
    """Raises InputError for data and sidecars that are not there. Nothing here needs seconds of imports."""
    check_data(config.data.train, "data.train")
    for name, split in config.eval.splits.items() if config.eval.every else ():
        check_data(split, f"eval.splits.{name}")
    for folder in config.data.sidecars:
        if not Path(folder).expanduser().is_dir():
            raise InputError(f"data.sidecars: expected a folder, got {folder!r}, which does not exist")


def _with_micro_batch(config: Any) -> Any:
    """Returns `config` with the largest data.micro_batch that fits in place of "auto"."""
    from simplclip.common.hardware import pick_device
    from simplclip.plan.search import largest_micro_batch

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = largest_micro_batch(config, pick_device(config.run.device), ranks)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"memory     data.micro_batch = {micro_batch or 'null'} fits, by simplclip plan")
    return config.replaced(data={"micro_batch": micro_batch})
