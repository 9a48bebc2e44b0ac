"""Tiny transformers models with random weights, and their batches."""

from typing import Any

import torch
import transformers
from torch import Tensor

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
IMAGE = {"image_size": 16, "patch_size": 8}


def config(name: str = "CLIPModel") -> transformers.PretrainedConfig:
    cls = getattr(transformers, name.replace("Model", "Config"))
    if name.startswith("Siglip"):
        return cls(text_config=TEXT | {"projection_size": 32}, vision_config=VISION | IMAGE)
    return cls(text_config=TEXT, vision_config=VISION | IMAGE, projection_dim=16)


def model(name: str = "CLIPModel", seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    return getattr(transformers, name)._from_config(config(name))


def batch(name: str = "CLIPModel", n: int = 6) -> dict[str, Tensor]:
    """Returns texts of 9 to 12 tokens, padded if the model allows it, and images."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 98, (n, 12), generator=g)
    lengths = torch.arange(n) % 4 + 9
    ids[torch.arange(n), lengths - 1] = 99
    inputs = {"input_ids": ids, "pixel_values": torch.randn(n, 3, 16, 16, generator=g)}
    if not name.startswith("Siglip"):
        inputs["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()
        ids *= inputs["attention_mask"]
    return inputs


def step(
    model: transformers.PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Returns the result with return_loss, and the gradients of the loss by parameter."""
    model.zero_grad()
    out = model(**inputs, return_loss=True)
    out[0].backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
