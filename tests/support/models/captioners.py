"""A small CoCa of open_clip with random weights."""

import json
from pathlib import Path

import open_clip
import torch
from torch import nn

from simplclip import models

NAME = "caption-tiny-coca"
CONTEXT = 12
_TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
_VISION = {
    "image_size": 32,
    "layers": 1,
    "width": 16,
    "patch_size": 16,
    "head_width": 8,
    "output_tokens": True,
    "attentional_pool": True,
    "attn_pooler_heads": 2,
    "attn_pooler_queries": 8,
}
_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": _VISION,
    "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**_TEXT, "attn_pooler_heads": 2},
    "custom_text": True,
}


def register(folder: Path) -> None:
    """Registers the models NAME and NAME-wide in open_clip.

    The weights of NAME-wide fit no other model.
    """
    for name, changes in ((NAME, {}), (f"{NAME}-wide", {"embed_dim": 24})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(_CONFIG | changes))
        open_clip.add_model_config(path)


def build(spread: float = 0.3) -> nn.Module:
    """Returns the model with random weights, since open_clip leaves some weights of the decoder
    uninitialised.
    """
    torch.manual_seed(0)
    model = models.create(f"open_clip:{NAME}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
    return model.eval()
