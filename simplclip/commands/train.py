"""The command `simplclip train`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simplclip.commands.app import app
from simplclip.commands.options import Overrides, check_data, fail
from simplclip.common.errors import InputError, UserError

if TYPE_CHECKING:
    from simplclip.train.config import Config


def _config_help(wanted: bool) -> None:
    """Prints every key of the config and ends the command, if `wanted`."""
    if wanted:
        from simplclip.train import config

        typer.echo(config.describe())
        raise typer.Exit


@app.command(
    short_help="Train a model.",
    epilog="Example: simplclip train siclip-s0 --set data.train='shards/*.tar' --resume",
)
def train(
    config: Annotated[
        str, typer.Argument(help="YAML file, or the name of a built-in config such as siclip-s0.")
    ],
    set_: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from run.out/last.pt; start at step 0 if there is none."
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
    try:
        values = configs.load(config, set_ or ())
        if not any(item.partition("=")[0].strip() in ("run", "run.out") for item in set_ or ()):
            old, values = values.run.out, configs.relocated(values, Path(config))
            if values.run.out != old and os.environ.get("RANK", "0") == "0":
                typer.echo(
                    f"run        in {values.run.out}, where {config} lies; --set run.out={old} "
                    "means its former place"
                )
        # With several nodes the ranks agree later, since one node alone may lack files.
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            check(values, resume)
    except (UserError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise typer.Exit(2) from error

    # outside of the try: after a Ctrl-C that stops this import, `except` would begin it again
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
    from simplclip.plan.search import fitting
    from simplclip.plan.step import planned

    size = config.data.batch_size // ranks
    share = config.replaced(data={"batch_size": size, "micro_batch": None})
    precision, _ = hardware.pick_precision(config.run.precision, device)
    with planned(share, precision, device.type) as step:
        micro = fitting(step, size, hardware.total_memory(device)).micro_batch
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"memory     data.micro_batch = {micro or 'null'} fits, by simplclip plan")
    return config.replaced(data={"micro_batch": micro})


def check(config: Config, resume: bool) -> None:
    """Raises InputError or OSError for a wrong name, folder or file, ModuleNotFoundError for a
    missing package; changes nothing. Only a run.device of a GPU needs seconds of imports.
    """
    from simplclip.models.naming import check_name
    from simplclip.train.config import check_out

    check_name(config.model.name, "model.name")
    check_out(Path(config.run.out), resume)
    check_sources(config)
    for package, needed in (("tensorboard", config.run.tensorboard), ("peft", config.model.lora)):
        if needed and find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if config.run.device.startswith("cuda"):
        if not _has_driver():
            got = f"got {config.run.device!r}; it has no driver of a GPU"
            raise InputError(f"run.device: expected a device of this machine, {got}")
        from simplclip.common.hardware import pick_device  # imports torch, which takes two seconds

        pick_device(config.run.device)


def _has_driver() -> bool:
    """Whether the machine has the driver of CUDA or ROCm."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return os.path.exists("/dev/kfd")


def check_sources(config: Config) -> None:
    """Raises InputError for training data, eval.splits (if used) or sidecars that are not there."""
    check_data(config.data.train, "data.train")
    if config.eval.every:
        for name, split in config.eval.splits.items():
            check_data(split, f"eval.splits.{name}")
    for folder in config.data.sidecars:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise InputError(
                f"data.sidecars: expected a folder, got {folder!r}, which does not exist"
            )
