"""What a config leaves open, resolved before the first step of its run.

data.micro_batch    auto: the largest that fits a GPU, as two small steps measure it
data.train          tables and folders: the shards that the run packs
eval.hold_out_by    null: what the checkpoint has, else "picture"
run.epochs          becomes run.steps, by the number of samples
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from simplclip import data, evaluation
from simplclip.common.files import remove_leftovers
from simplclip.common.hardware import pick_device
from simplclip.common.progress import print_lines
from simplclip.models.registry import cut_in_words
from simplclip.models.trained import tokenizer
from simplclip.train import checkpoint, micro_batch
from simplclip.train.config import Config, ConfigError, check_new_run


class Resolved(NamedTuple):
    """A config in which nothing is open, and what was counted of its data."""

    config: Config
    samples: int | None  # images of an epoch; None if they are not counted
    division: data.Division | None  # what eval.hold_out makes of the data; None if it is 0
    lines: list[str]  # for the log: examples of captions, and what is wrong with them


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
    """Packs tables and folders, counts the data, looks at captions, and resolves the rest.

    Leftovers of killed processes are removed. Raises ConfigError if the samples are not counted, or
    if the config cannot continue the run of the checkpoint `former`.
    """
    out = Path(config.run.out)
    if not former:
        check_new_run(config)
    remove_leftovers(out, checkpoint.WRITTEN.fullmatch)
    config = config.replaced(data={"train": data.pack_shards(config.data.train, out / "shards")})
    if config.eval.hold_out and config.eval.hold_out_by is None:
        # a run keeps what it began with: the other would evaluate images that it has trained on
        by = former["config"].get("eval", {}).get("hold_out_by") if former else "picture"
        config = config.replaced(eval={"hold_out_by": by})
    division = _count_division(config) if config.eval.hold_out else None
    samples = config.data.samples
    if samples is None:
        samples = division.train if division else data.dataset_size(config.data.train)
    if config.run.epochs is not None:
        if samples is None:
            raise ConfigError(
                "data.samples: expected the number of samples N, for run.epochs, by --set "
                "data.samples=N, got null and no meta.json"
            )
        number = max(1, round(samples * config.run.epochs / config.data.batch_size))
        config = config.replaced(run={"steps": number, "epochs": None})
    return Resolved(config, samples, division, list(_lines_on_captions(config)))


def _lines_on_captions(config: Config) -> Iterator[str]:
    """Yields lines for the log about some captions of packed data; none if none can be read."""
    some = data.some_captions(config.data.train, config.data.sidecars)
    if not some.names:
        return
    for example in some.examples():
        yield f"caption    {example}"
    yield f"captions   {some.counts()}"
    cut = cut_in_words(tokenizer(config.model.model_dump()), some.all)
    for problem in filter(None, (some.warning(), cut)):
        yield f"warning    {problem}"


def _count_division(config: Config) -> data.Division:
    """Counts what eval.hold_out makes of the data; raises ConfigError if too little is left."""
    share = config.eval.hold_out
    division = data.count_division(
        config.data.train, share, config.data.sidecars, config.eval.hold_out_by
    )
    if not division.train or division.held_out < evaluation.LEAST_SAMPLES:
        raise ConfigError(
            "eval.hold_out: expected a share that leaves samples to train on, and at least "
            f"{evaluation.LEAST_SAMPLES} held out, got {share:g}: {division.train} that train and "
            f"{division.held_out} that are held out"
        )
    return division
