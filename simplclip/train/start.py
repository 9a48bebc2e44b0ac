"""The weights with which a run began, made again from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from simplclip.common.errors import InputError, first_line
from simplclip.models.trained import build_model
from simplclip.models.transfer import Status, WeightTable
from simplclip.train.config import Config, from_dict
from simplclip.train.setup import sources_of, take_start

# They begin at constants, and features do not depend on them.
_SCALES = ("logit_scale", "logit_bias")


def load_start(
    checkpoint: str | Path, values: Mapping[str, Any]
) -> tuple[str, Mapping[str, Tensor]]:
    """Returns the sources of the weights with which a run began, and these as a state dict.

    checkpoint: a file of the run, or its folder. values: its config, whose model.checkpoint and
    inherit.source are read again, from the folder where the run was started if they are there.
    Raises InputError, in one line, if one is gone, or if tensors of the model are in none of them.
    """
    try:
        named = from_dict(dict(values))
        config = _located(named, Path(checkpoint))
        model = build_model(config.model.model_dump(), config.loss.base)
        tables = take_start(model, config)
    except (InputError, OSError) as error:
        raise InputError(
            f"blend: expected the weights from which {checkpoint} started, got {first_line(error)}"
        ) from None
    if new := _new(model.state_dict(), tables):
        raise InputError(
            "blend: expected a run that starts from trained weights of its own architecture, got "
            f"{checkpoint}, in which {len(new)} tensors, {new[0]} first, are new"
        )
    return ", ".join(sources_of(named)), model.state_dict()


def _new(state: Mapping[str, Tensor], tables: list[WeightTable]) -> list[str]:
    """Returns the names of the tensors that do not begin as a source has them."""
    new = {name: True for name in state if name not in _SCALES}
    for table in tables:
        for name in new:
            status = table.status(name)
            if status not in (Status.NEW, Status.DIFFERS):
                new[name] = status == Status.STARTED
    return [name for name, is_new in new.items() if is_new]


def _located(config: Config, checkpoint: Path) -> Config:
    """Returns the config with the paths of its sources from where the run was started."""
    folder = (checkpoint if checkpoint.is_dir() else checkpoint.parent).resolve()
    out = Path(config.run.out).parts
    if folder.parts[-len(out) :] != out:  # the run was moved
        return config
    started_in = Path(*folder.parts[: -len(out)])

    def located(source: Any) -> Any:
        if isinstance(source, list):
            return [*map(located, source)]
        path = started_in / (source or "")
        return str(path) if source and path.exists() else source

    weights, inherited = located(config.model.checkpoint), located(config.inherit.source)
    return config.replaced(model={"checkpoint": weights}, inherit={"source": inherited})
