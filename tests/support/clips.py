"""Tiny open_clip models and their batches."""

import torch
from open_clip.model import CLIP

VIT = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 24, "heads": 2, "layers": 4}


def clip(vision=VIT, text=None, cls=CLIP, seed=0, **options):
    torch.manual_seed(seed)
    return cls(16, dict(vision), {**TEXT, **(text or {})}, **options)


def restless(model):
    """Randomises simplified blocks, which mix no tokens at the start.

    Returns the model in eval mode.
    """
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith(("qk.weight", "beta")):
            torch.nn.init.normal_(p, std=0.5)
        elif "layer_scale" in name:
            torch.nn.init.uniform_(p)
    return model.eval()


def batch(size=16, n=3):
    g = torch.Generator().manual_seed(1)
    text = torch.randint(1, 99, (n, 12), generator=g)
    text[:, 8] = 99
    text[:, 9:] = 0
    return torch.randn(n, 3, size, size, generator=g), text
