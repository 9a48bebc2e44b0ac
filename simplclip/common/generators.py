"""The states of torch's random generators: of gradient caching, and of checkpoints."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class States(TypedDict, total=False):
    """The states of the generators, as a checkpoint has them."""

    torch: Tensor  # of the CPU
    cuda: list[Tensor]  # of all CUDA devices; missing while CUDA is not initialised


def states() -> States:
    """Returns the states of the generators; the loader draws from its own."""
    states: States = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore(former: States) -> None:
    """Sets the generators; those of CUDA devices only if the number of devices is the same."""
    torch.set_rng_state(former["torch"])
    if "cuda" in former and torch.cuda.device_count() == len(former["cuda"]):
        torch.cuda.set_rng_state_all(former["cuda"])
