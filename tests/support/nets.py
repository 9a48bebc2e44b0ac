"""Networks for the tests of folding."""

import torch
from torch import nn


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the model in eval mode, with batch norms and layer scales that change their input."""
    torch.manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        for name in ("gamma", "layer_scale"):
            if isinstance(getattr(module, name, None), nn.Parameter) and not hasattr(
                module, "alpha"
            ):
                nn.init.uniform_(getattr(module, name), 0.1, 0.5)
    return model.eval()
