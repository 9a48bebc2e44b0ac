"""The optimizer of a run, the learning rate of each step, and averages of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simplclip.train.config import Config, ConfigError


class Average:
    """The moving average of a run's weights: v = decay v + (1 - decay) w after each step.

    It copies each parameter that trains, but no buffers: with the averages a model has those of the
    last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copies the weights of `model` that train, at which the averages start."""
        self.averages = {
            weight: weight.detach().clone() for weight in model.parameters() if weight.requires_grad
        }
        # a weight that blocks share has several
        names = model.state_dict(keep_vars=True).items()
        self.names = {name: weight for name, weight in names if weight.requires_grad}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the present weights; to be called after each step."""
        self._average(list(self.averages.values()), list(self.averages), 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model has the averages as its parameters; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchanges the weights of the model and the averages, without copying them."""
        for weight, average in self.averages.items():
            weight.data, self.averages[weight] = average, weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages by the names of the model's state dict."""
        return {name: self.averages[weight] for name, weight in self.names.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Overwrites the averages by those of a state dict; KeyError if one is missing."""
        for name, weight in self.names.items():
            self.averages[weight].copy_(state[name])


def make_optimizer(model: nn.Module, loss: nn.Module, config: Config) -> torch.optim.AdamW:
    """Returns an AdamW of the parameters of `model` and `loss` that train; only matrices decay.

    Raises ConfigError for optim.options that AdamW does not take.
    """
    options = config.optim.options
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        # A matrix has two dimensions above 1; a layer scale [C, 1, 1] is a gain.
        if sum(size > 1 for size in parameter.shape) >= 2:
            decayed.append(parameter)
        else:
            rest.append(parameter)
    rest += [parameter for parameter in loss.parameters() if parameter.requires_grad]
    groups = [
        {"params": decayed, "weight_decay": config.optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    try:
        return torch.optim.AdamW(
            groups, lr=config.optim.lr, weight_decay=0.0, fused=True, **options
        )
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"optim.options: expected arguments of torch.optim.AdamW, got {options}: {error}"
        ) from None


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for moments of another shape, beyond which fused updates would read."""
    for weight, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", *(moments.keys() & {"max_exp_avg_sq"})):
            if moments[name].shape != weight.shape:
                raise ValueError(
                    f"{name} of shape {list(moments[name].shape)} for {list(weight.shape)}"
                )


def learning_rate(config: Config, step: int) -> float:
    """Returns the learning rate of `step` (from 0): linear warm-up, then a cosine down to 0."""
    lr, warmup, steps = config.optim.lr, config.optim.warmup, config.run.steps
    assert steps is not None  # see resolve.py
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * done))
