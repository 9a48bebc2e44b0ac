"""What all nodes of a run must have alike: config, data, frozen weights.

Each node has files of its own, perhaps others under the same paths. A function here compares them
with those of the first rank; if a rank has others, it raises an error, and all ranks end. All ranks
have to call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import NamedTuple

from torch import nn

from simplclip import data
from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import differences
from simplclip.data.find_sidecars import sidecars_of
from simplclip.data.find_sources import Source
from simplclip.data.samples import digest_of
from simplclip.evaluation import Split
from simplclip.models.weights import checksums
from simplclip.train.config import Config, ConfigError


class _File(NamedTuple):
    """A file of the data, as nodes compare it."""

    name: str
    weight: float
    size: int | None  # bytes; None for a stream or folder

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f" with weight {self.weight:g}"
        size = "" if self.size is None else f" of {self.size:,} bytes"
        return f"{self.name}{weight}{size}"


def check_configs(config: Config) -> None:
    """Raises ConfigError for another config, but for run.out, where only the first rank writes."""
    own = config.to_dict()
    first = ranks.all_gather(own)[0]
    with ranks.fail_together():
        for key, (expected, got) in differences(first, own).items():
            if key != "run.out":
                raise ConfigError(
                    f"{key}: expected {_cut(expected)}, as on the first rank, got {_cut(got)}; all "
                    "nodes need the same config"
                )


def _cut(value: object) -> str:
    """Returns a value as text, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_data(loader: data.Loader, splits: Mapping[str, Split]) -> None:
    """Raises InputError for shards, sidecars or held-out data of other names or sizes."""
    if ranks.count() == 1:
        return
    own = _files_of(loader, splits)
    if len({*ranks.all_gather(digest_of([own]))}) == 1:
        return
    first = ranks.all_gather(own)[0]
    with ranks.fail_together():
        for argument, files in own.items():
            for expected, got in zip_longest(first[argument], files, fillvalue="no more files"):
                if expected != got:
                    raise InputError(
                        f"{argument}: expected {expected}, as on the first rank, got {got}; all "
                        "nodes need the same data"
                    )


def _files_of(loader: data.Loader, splits: Mapping[str, Split]) -> dict[str, list[_File]]:
    """Returns the files of a run's data, by the argument that names them."""
    files = {"data.train": _files(loader.sources), "data.sidecars": []}
    for source in loader.sources:
        for path in sidecars_of(source.url, loader.sidecars):
            files["data.sidecars"].append(_File(path, 1.0, os.path.getsize(path)))
    for name, split in splits.items():
        files[f"eval.splits.{name}"] = _files(split.data.sources)
    return files


def _files(sources: Iterable[Source]) -> list[_File]:
    """Returns the file of each source."""
    files = []
    for source in sources:
        size = os.path.getsize(source.url) if os.path.isfile(source.url) else None
        files.append(_File(source.name, source.weight, size))
    return files


def check_frozen(model: nn.Module) -> None:
    """Raises InputError for other frozen weights; `distributed.wrap` makes the others equal."""
    if ranks.count() == 1:
        return
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    own = checksums(frozen)
    first = ranks.all_gather(own)[0]
    with ranks.fail_together():
        for name in differences(first, own):
            raise InputError(
                "inherit.source, model.checkpoint: expected the weights of the first rank, got "
                f"others in {name}; all nodes need the same file"
            )
