"""The batches of a run's steps, from its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from simplclip import data
from simplclip.common import ranks
from simplclip.data.epoch import Share
from simplclip.data.pairs import epoch_size
from simplclip.train.config import ConfigError, from_dict
from simplclip.train.settings import Config
from simplclip.train.state import Training, tokenizer

UNCOUNTED = "streams, a broken shard, or more than 1 GiB to read; `simplclip data index` counts shards on the disk"


def with_steps(config: Config) -> Config:
    """Returns `config` with run.steps in place of run.epochs. Raises ConfigError if the samples are not counted."""
    if config.run.epochs is None:
        return config
    samples = epoch_size(data.parts_of(config.data.train, "data.train"))
    if samples is None:
        raise ConfigError(
            f"run.epochs: expected data.train whose samples are counted, got data that are not: {UNCOUNTED}; or set run.steps"
        )
    batch = config.data.batch_size
    size = batch if config.data.micro_batch == "auto" else config.data.images_at_a_time
    values = config.to_dict()
    steps = max(1, round(samples // size * size * config.run.epochs / batch))  # the loader drops a last batch below `size`
    values["run"] |= {"steps": steps, "epochs": None}
    return from_dict(values)


def loader(training: Training) -> data.Loader:
    """Makes the loader of the pairs that the run's config names. A batch of the loader is a micro-batch of a step."""
    config, c = training.config, training.config.data
    if c.images_at_a_time % ranks.count():
        key = "data.micro_batch" if c.micro_batch else "data.batch_size"
        raise ConfigError(f"{key}: expected a multiple of the {ranks.count()} ranks, got {c.images_at_a_time}")
    options: dict[str, Any] = {"sidecars": c.sidecars}
    if training.prefix:
        options |= {"sidecars": [*c.sidecars, c.cache_prefix], "prefix": training.prefix.shape}
    return data.make_loader(
        data.parts_of(c.train, "data.train"),
        tokenizer=tokenizer(config),
        transform=training.transform,
        batch_size=c.images_at_a_time,
        captions_per_image=c.captions_per_image,
        teacher=config.loss.needs_teacher,
        workers=c.workers,
        seed=config.run.seed,
        pin_memory=training.device.type == "cuda",
        share=Share(ranks.number(), ranks.count(), ranks.Exchange()) if ranks.count() > 1 else None,
        **options | c.options,
    )


def batches(
    training: Training, source: data.Loader | None = None, show: Callable[[str], None] = print
) -> Iterator[list[dict[str, Any]]]:
    """Yields the micro-batches of each step, one or several, from the position of `training` on, without end.

    A step may take micro-batches of two epochs. The loader draws nothing from the global random generators.

    source: by default `loader(training)`. show: gets a line on samples that an epoch skipped, and on each restarted worker.
    """
    source = loader(training) if source is None else source
    wanted = training.config.data.batch_size // training.config.data.images_at_a_time
    of_step: list[dict[str, Any]] = []
    last, restarts = None, 0
    while True:
        for batch in source.epoch(training.epoch, training.batch, training.data):
            training.batch += 1
            for restart in source.restarts[restarts:]:
                restarts += 1
                show(f"data       {restart}")
            if wanted > 1:  # copies: a tensor from a loader process holds a file descriptor, and a step may have thousands
                batch = {k: v if v.is_pinned() else v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}
            of_step.append(batch)
            if len(of_step) == wanted:
                training.data = source.state()
                yield _joined(of_step, ranks.count())
                of_step = []
        if last != (report := source.report()):  # a report equal to the last one is not shown
            last = report
            show(f"data       epoch {training.epoch}: {report}")
        training.epoch, training.batch = training.epoch + 1, 0


def _joined(of_step: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Joins this rank's shares of the loader's batches: each `ranks` shares make a micro-batch of the configured size."""
    if ranks == 1 or len(of_step) == 1:
        return of_step
    groups = [of_step[start : start + ranks] for start in range(0, len(of_step), ranks)]
    return [{name: torch.cat([part[name] for part in group]) for name in group[0]} for group in groups]
