"""Builds the model of a config or of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from simplclip import models
from simplclip.train import checkpoint as checkpoints
from simplclip.train import config as configs


def build_model(config: configs.Config) -> nn.Module:
    """The model that `config` names, with random weights. Raises ConfigError for options that it does not accept."""
    try:
        return models.create(config.model.name, **config.model.options)
    except TypeError as error:
        raise configs.ConfigError(
            f"model.options: expected options of {config.model.name}, got {config.model.options}: {error}"
        ) from error


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, configs.Config, dict[str, Any]]:
    """The model in eval mode, config and raw state of a checkpoint. Raises FileNotFoundError, CheckpointError."""
    state = checkpoints.load(path)
    config = configs.from_dict(state["config"])
    model = build_model(config)
    try:
        model.load_state_dict(state["model"], strict=True)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise checkpoints.CheckpointError(
            f"{path}: expected weights of {config.model.name!r}, the model of its config: {' '.join(reasons)[:300]}"
        ) from None
    return model.to(device).eval(), config, state
