"""The states of torch's random generators."""

from __future__ import annotations

import torch
from torch import Tensor

States = tuple[Tensor, list[Tensor]]  # of the CPU, and of all CUDA devices


def states() -> States:
    """Returns the states of the generators; none of CUDA devices while CUDA is not initialised."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def restore(former: States) -> None:
    """Sets the generators to states that `states` returned."""
    torch.set_rng_state(former[0])
    torch.cuda.set_rng_state_all(former[1])
