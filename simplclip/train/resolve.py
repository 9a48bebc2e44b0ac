"""What a config leaves open, resolved before the first step of its run.

data.micro_batch    auto: the largest that fits a GPU, as two small steps measure it
data.train          tables and folders: the shards that the run packs
run.epochs          becomes run.steps, by the number of samples
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from simplclip import data
from simplclip.common.files import remove_leftovers
from simplclip.common.hardware import pick_device
from simplclip.common.progress import print_lines
from simplclip.train import checkpoint, micro_batch
from simplclip.train.config import Config, ConfigError, check_new_run


class Resolved(NamedTuple):
    """A config in which nothing is open, and the number of its images."""

    config: Config
    samples: int | None  # images that train in an epoch; None if no meta.json has their number


def resolve_micro_batch(config: Config, console: Console) -> Config:
    """Returns `config` with a number or null as data.micro_batch, and prints it; auto is measured.

    Raises ConfigError for auto without a GPU, or with several ranks.
    """
    if config.data.micro_batch != "auto":
        return config
    device = pick_device(config.run.device)
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "data.micro_batch: expected a number, got auto, which is measured on one GPU; "
            "elsewhere `simplclip train` predicts it"
        )
    size = micro_batch.measured(config, device)
    print_lines(f"memory     data.micro_batch = {size or 'null'} fits, as measured", console)
    return config.replaced(data={"micro_batch": size})


def resolve(config: Config, former: dict[str, Any] | None) -> Resolved:
    """Packs tables and folders, and resolves the rest.

    Leftovers of killed processes are removed. Raises ConfigError if the samples are not counted, or
    if the config cannot continue the run of the checkpoint `former`.
    """
    out = Path(config.run.out)
    if not former:
        check_new_run(config)
    remove_leftovers(out, checkpoint.WRITTEN.fullmatch)
    config = config.replaced(data={"train": data.pack_shards(config.data.train, out / "shards")})
    samples = config.data.samples
    if samples is None:
        samples = data.dataset_size(config.data.train)
        if samples is not None:
            samples = max(1, round(samples * (1 - config.eval.hold_out)))
    if config.run.epochs is not None:
        if samples is None:
            raise ConfigError(
                "data.samples: expected the number of samples N, for run.epochs, by --set "
                "data.samples=N, got null and no meta.json"
            )
        number = max(1, round(samples * config.run.epochs / config.data.batch_size))
        config = config.replaced(run={"steps": number, "epochs": None})
    return Resolved(config, samples)
