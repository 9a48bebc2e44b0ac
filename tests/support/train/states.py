"""States of runs whose weights are random: no file of weights is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simplclip import models
from simplclip.train import setup
from simplclip.train.config import Config
from simplclip.train.setup import State

CPU = torch.device("cpu")


def random_state(config: Config) -> State:
    """Makes the state of a run on the CPU in float32; texts are computed at full length."""
    with torch.device("meta"):  # folding frozen parts makes new modules
        prepared = setup.prepare_model(*setup.shapes_of(config), [], config, CPU)
    if prepared.crop is not None:
        prepared.crop.undo()
        prepared.crop = None
    for module in (prepared.model, *prepared.folded.values()):
        fill(module.to_empty(device=CPU))
    return setup.make_state(config, CPU, "fp32", prepared=prepared)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Overwrites parameters and buffers by values with which a step runs."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # of a norm
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            tensor.fill_(1)
        elif name.endswith("attn_mask"):  # of a causal tower, which checks it
            tensor.fill_(-torch.inf).triu_(1)
        elif isinstance(tensor, nn.Parameter):
            tensor.normal_(0, 0.02)
        else:
            tensor.zero_()


def random_batches(state: State) -> list[dict[str, Any]]:
    """Returns the micro-batches of a step with random images and equal texts."""
    data, name = state.config.data, state.config.model.name
    draw = torch.Generator().manual_seed(2)
    size = state.model.visual.image_size
    side = (size, size) if isinstance(size, int) else size
    text: Tensor = models.tokenizer(name)(["a photo of a small thing"])
    return [
        {
            "image": torch.randint(
                256, (data.images_at_a_time, 3, *side), dtype=torch.uint8, generator=draw
            ),
            "text": text.expand(data.images_at_a_time, -1).contiguous(),
            "group": torch.arange(data.images_at_a_time) + first,
        }
        for first in range(0, data.batch_size, data.images_at_a_time)
    ]
