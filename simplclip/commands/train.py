"""The command `simplclip train`."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Overrides, fail
from simplclip.common.errors import UserError
from simplclip.common.files import differences

if TYPE_CHECKING:
    from simplclip.train.config import Config


def _config_help(wanted: bool) -> None:
    """Prints every key of the config and ends the command, if `wanted`."""
    if wanted:
        from simplclip.train import config

        typer.echo(config.describe())
        raise typer.Exit


@app.command(epilog="Example: simplclip train siclip-s0 --set data.train='shards/*.tar' --resume")
def train(
    config: Annotated[
        str, typer.Argument(help="YAML file, or the name of a built-in config such as siclip-s0.")
    ],
    set_: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from run.out/last.pt, with the config.yaml beside it and then --set; "
            "start at step 0 if there is none.",
        ),
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
    """Train a model.

    Ctrl-C finishes the running step, saves a checkpoint and exits; --resume continues from it.
    """
    from simplclip.train import config as configs

    # torch reads it when it is imported: else each rank warns of a search for unused parameters
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    values = given = configs.load(config, set_ or ())
    own = Path(given.run.out, "config.yaml")
    if resume and own.exists():
        out = f"run.out={json.dumps(given.run.out)}"
        values = configs.load(own, [*(set_ or ()), out])
    changed = differences(given.to_dict(), values.to_dict())
    if changed and os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"resume     {own} is used, not {config}, which differs in {', '.join(changed)}; "
            "--set changes settings"
        )

    # outside of a try: after a Ctrl-C that stops this import, `except` would begin it again
    from simplclip.train import Interrupted, TrainingError, run

    try:
        run(predict_micro_batch(values), resume=resume)
    except Interrupted as stop:
        fail(str(stop), 130)
    except TrainingError as error:
        if error.__cause__ and not isinstance(error.__cause__, (UserError, OSError)):
            traceback.print_exception(error.__cause__)
        fail(str(error), 1)


def predict_micro_batch(config: Config) -> Config:
    """Returns the config with a predicted data.micro_batch in place of auto, where no GPU measures
    it: without a GPU, and with several ranks.

    These share data.batch_size; the texts that a rank gets from the others are not counted. Raises
    ConfigError if not even one pair at a time fits.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.data.micro_batch != "auto":
        return config
    from simplclip.common import hardware

    device = hardware.pick_device(config.run.device)
    if device.type == "cuda" and ranks == 1:
        return config
    from simplclip.plan.step import Step

    size = config.data.batch_size // ranks
    share = config.replaced(data={"batch_size": size, "micro_batch": None})
    precision, _ = hardware.pick_precision(config.run.precision, device)
    step = Step(share, precision, device)
    row = step.fitting(size, hardware.total_memory(device))
    if os.environ.get("RANK", "0") == "0":
        from simplclip.train.resolve import memory_line

        line = memory_line(row.micro_batch, row.checkpointed)
        typer.echo(f"{line}, by simplclip plan")
    return config.replaced(
        model={"grad_checkpointing": row.checkpointed}, data={"micro_batch": row.micro_batch}
    )
