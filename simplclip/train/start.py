"""The weights with which a run began, made again from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from simplclip.common.errors import InputError, first_line
from simplclip.models.naming import SCALARS
from simplclip.models.trained import build_model
from simplclip.models.weights import checksums, plain_name
from simplclip.train.config import from_dict
from simplclip.train.setup import sources_of, take_start


def load_start(
    checkpoint: str | Path, state: Mapping[str, Any]
) -> tuple[str, Mapping[str, Tensor]]:
    """Returns the sources of the weights with which a run began, and these as a state dict.

    checkpoint: names the run in errors. state: its content, by `read_checkpoint`. With LoRA it has
    the start; else model.checkpoint and inherit.source of its config are read again, and compared
    with its checksums. Positional embeddings are not compared.
    Raises InputError, in one line, if a source is gone or has other weights, or if tensors of the
    model are in none of them.
    """
    config = from_dict(dict(state["config"]))
    names = ", ".join(sources_of(config))
    if config.model.lora:
        return names, {plain_name(name): weight for name, weight in state["start"].items()}
    expected = f"blend: expected the weights from which {checkpoint} started, got "
    try:
        model = build_model(config.model.model_dump(), config.loss.base)
        tables = take_start(model, config)
    except (InputError, OSError) as error:
        raise InputError(f"{expected}{first_line(error)}") from None
    start = model.state_dict()
    new = [name for name in start if name not in SCALARS]
    for table in tables:
        new = [name for name in new if table.status(name) == "new"]
    if new or config.inherit.blocks is not None:
        why = "whose blocks start by inherit.blocks"
        if new:
            why = f"in which {len(new)} tensors, {new[0]} first, are new"
        raise InputError(
            "blend: expected a run that starts from trained weights of its own architecture, got "
            f"{checkpoint}, {why}"
        )
    former = state.get("start")
    if not former:  # of an earlier version
        return f"{names}, not known to be unchanged", start
    for name, checksum in checksums(start).items():
        # they may be interpolated, whose last bits depend on the CPU
        is_position = name.endswith(("positional_embedding", "pos_embed"))
        if former[name] != checksum and not is_position:
            files = ", ".join(source for table in tables for source in table.sources)
            raise InputError(f"{expected}others in {files}, of {name} first")
    return names, start
