"""Limits on the actions of a program that only reads a checkpoint or the folder of a run.

Such a file may come from elsewhere. Its settings may name local files. Commands, URLs, and options of open_clip that fetch or
unpickle files are taken only from the text that this user typed: the command line, or a config file named there. With
trust=True (--trust) such commands, URLs and options are taken from the file too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.pairs import addresses
from simplclip.train.settings import Config


def check_splits(splits: Mapping[str, Any], where: str) -> None:
    """Raises InputError for stored eval.splits that are commands or URLs."""
    for name, what in splits.items():
        for address in addresses(what):
            raise InputError(
                f"{where}: expected local files in its eval.splits, got {address!r}: commands and URLs are not taken from a "
                f"checkpoint; name the data by --data {name}=..., or, if you trust this file, --trust"
            )


def check_run(source: str, config: Config, typed: Sequence[str] = ()) -> None:
    """Raises InputError if `config` was read from the config.yaml of a run and has commands or URLs that nobody typed.

    source, typed: the source and the overrides that `config.load` was given.
    """
    file = Path(source)
    if file.name != "config.yaml" or not any((file.parent / name).exists() for name in ("last.pt", "metrics.csv")):
        return
    for key, what in _sources(config):
        names = [item.partition("=")[0].strip() for item in typed]
        if any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in names):
            continue
        for address in addresses(what):
            raise InputError(
                f"{source}: expected local files in the config.yaml of a run, got {key} = {address!r}: commands and URLs are "
                f"not taken from a run's folder; if they are yours: --trust, or --set {key}=..."
            )


def flag(config: Config) -> str:
    """Returns the flag that a command needs to continue a run from its config.yaml, or an empty string."""
    return " --trust" if any(address for _, what in _sources(config) for address in addresses(what)) else ""


def _sources(config: Config) -> Iterator[tuple[str, Any]]:
    yield "data.train", config.data.train
    if config.eval.every:
        yield from ((f"eval.splits.{name}", what) for name, what in config.eval.splits.items())
