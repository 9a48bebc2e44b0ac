"""The weights with which a run began, made again from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from simplclip.common.errors import InputError, first_line
from simplclip.models.inherit import Status
from simplclip.models.naming import SCALARS
from simplclip.models.trained import build_model
from simplclip.train.config import from_dict
from simplclip.train.setup import sources_of, take_start


def load_start(
    checkpoint: str | Path, values: Mapping[str, Any]
) -> tuple[str, Mapping[str, Tensor]]:
    """Returns the sources of the weights with which a run began, and these as a state dict.

    checkpoint: names the run in errors. values: its config, whose model.checkpoint and
    inherit.source are read again.
    Raises InputError, in one line, if one is gone, or if tensors of the model are in none of them.
    """
    try:
        config = from_dict(dict(values))
        model = build_model(config.model.model_dump(), config.loss.base)
        tables = take_start(model, config)
    except (InputError, OSError) as error:
        raise InputError(
            f"blend: expected the weights from which {checkpoint} started, got {first_line(error)}"
        ) from None
    new = [name for name in model.state_dict() if name not in SCALARS]
    for table in tables:
        new = [name for name in new if table.status(name) == Status.NEW]
    if new or config.inherit.blocks is not None:
        why = "whose blocks start by inherit.blocks"
        if new:
            why = f"in which {len(new)} tensors, {new[0]} first, are new"
        raise InputError(
            "blend: expected a run that starts from trained weights of its own architecture, got "
            f"{checkpoint}, {why}"
        )
    return ", ".join(sources_of(config)), model.state_dict()
