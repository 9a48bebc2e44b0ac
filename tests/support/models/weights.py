"""Weights for tests of models."""

import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Randomises weights, since mistakes hide at the start: attention is the identity, biases are
    0, norms do nothing.
    """
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


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
            scale = getattr(module, name, None)
            # gamma of a simplified block's attention, which has alpha too, is no layer scale
            if isinstance(scale, nn.Parameter) and not hasattr(module, "alpha"):
                nn.init.uniform_(scale, 0.1, 0.5)
    return model.eval()
