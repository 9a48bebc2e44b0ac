"""Tiny open_clip models and their batches, and models that open_clip makes by name."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

VIT = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 24, "heads": 2, "layers": 4}
# Models that open_clip makes by name, once write_models has run: name -> width of the features.
MODELS = {"tiny": 16, "tiny-wide": 24, "tiny-coca": 16}
MODEL_VISION = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
MODEL_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def clip(
    vision: dict = VIT,
    text: dict | None = None,
    cls: type[nn.Module] = CLIP,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    torch.manual_seed(seed)
    return cls(16, dict(vision), {**TEXT, **(text or {})}, **options)


def restless(model: nn.Module) -> nn.Module:
    """Randomises simplified blocks, which mix no tokens at the start; returns it in eval mode."""
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith(("qk.weight", "beta")):
            nn.init.normal_(p, std=0.5)
        elif "layer_scale" in name:
            nn.init.uniform_(p)
    return model.eval()


def batch(size: int = 16, n: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    text = torch.randint(1, 99, (n, 12), generator=g)
    text[:, 8] = 99
    text[:, 9:] = 0
    return torch.randn(n, 3, size, size, generator=g), text


def write_models(folder: Path) -> None:
    """Writes configs and weights of models."""
    for name, width in MODELS.items():
        config = {"embed_dim": width, "vision_cfg": MODEL_VISION, "text_cfg": MODEL_TEXT}
        if "coca" in name:
            pool = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
            config["vision_cfg"] = MODEL_VISION | pool
            config["text_cfg"] = MODEL_TEXT | {"embed_cls": True, "output_tokens": True}
            config["multimodal_cfg"] = MODEL_TEXT | {"attn_pooler_heads": 2}
            config["custom_text"] = True
        (folder / f"{name}.json").write_text(json.dumps(config))
    register_models(folder)
    for name in MODELS:
        torch.manual_seed(7)
        model = open_clip.create_model(name)
        if hasattr(model, "text_decoder"):  # open_clip leaves these weights uninitialised
            nn.init.normal_(model.text_decoder.text_projection, std=0.25)
        torch.save(model.state_dict(), folder / f"{name}.bin")


def register_models(folder: Path) -> None:
    for name in MODELS:
        open_clip.add_model_config(folder / f"{name}.json")
