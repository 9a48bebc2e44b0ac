"""Weights for tests of models."""

import torch


@torch.no_grad()
def randomise(model):
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
