"""Tiny models of each kind for LoRA, as options of a config, and their batches."""

import json
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from transformers import BertConfig

from simplclip import models
from simplclip.train.config import Config
from support.train import tiny

TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 16}
VISION = {"width": 32, "head_width": 16, "layers": 2, "patch_size": 8, "image_size": 16}
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 2, "vocab_size": 49408, "max_position_embeddings": 16}
CONFIGS = {
    "lora-open-clip": {"vision_cfg": VISION, "text_cfg": TEXT},
    "lora-timm": {
        "vision_cfg": {"timm_model_name": "test_vit", "image_size": 32},
        "text_cfg": TEXT,
    },
    "lora-hugging-face": {"vision_cfg": VISION},
}


def register_models(folder: Path, dropout: float = 0.0) -> None:
    """Makes open_clip know the models; dropout: of Hugging Face's text tower."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    BertConfig(**BERT, **rates, pad_token_id=0).save_pretrained(folder / "bert")
    tower = {"hf_model_name": str(folder / "bert"), "hf_pooler_type": "mean_pooler"}
    CONFIGS["lora-hugging-face"]["text_cfg"] = tower | {"hf_proj_type": "mlp"}
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16} | config))
        open_clip.add_model_config(folder / f"{name}.json")


def started(model: nn.Module, seed: int = 3) -> nn.Module:
    """Gives the adapters of a model random values, as if it had trained; returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def batch(n: int = 6, seed: int = 1, side: int = 16) -> dict[str, Tensor]:
    """Returns images, uint8 [n, 3, side, side], and texts [n, 1, 16] of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 49000, (n, 1, 16), generator=generator)
    for row, length in enumerate(range(4, 4 + n)):
        text[row, :, length - 1] = 49407
        text[row, :, length:] = 0
    image = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"image": image, "text": text, "group": torch.arange(n)}


def config_of(folder: Path, kind: str, *changes: str, lora: str = "{rank: 4}") -> Config:
    """Returns the config of a run of a model of `register_models`, from random weights in a file.

    kind: the model's name without "lora-". lora: model.lora.
    """
    name = f"open_clip:lora-{kind}"
    weights = folder / f"{kind}.pt"
    if not weights.exists():
        torch.manual_seed(0)
        torch.save(models.create(name).state_dict(), weights)
    model = f"model={{name: '{name}', checkpoint: '{weights}', lora: {lora}}}"
    return tiny.settings(folder, model, "loss.pm_weight=0", *changes)
