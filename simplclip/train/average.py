"""The exponential moving average of a run's weights, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """v = decay v + (1 - decay) w after each step, for every parameter w that trains. Memory: one copy of them.

    Buffers are not averaged: with the averages the model has those of the last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        names = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.weights = list(dict.fromkeys(names.values()))
        self.averages = [weight.detach().clone() for weight in self.weights]
        places = {id(weight): i for i, weight in enumerate(self.weights)}
        self.names = {name: places[id(weight)] for name, weight in names.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        self._average(self.averages, self.weights, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this context the model has the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, weight in enumerate(self.weights):
            weight.data, self.averages[i] = self.averages[i], weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the model's state dict."""
        return {name: self.averages[i] for name, i in self.names.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, i in self.names.items():
            self.averages[i].copy_(state[name])
