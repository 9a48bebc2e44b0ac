"""The small SiCLIPs of the demo, which `simplclip.models` finds by entry points."""

from __future__ import annotations

from simplclip.demo import (
    trunks,  # noqa: F401 (registers the image trunks with timm)
    weights,
)
from simplclip.models.registry import Spec

_TINY_VOCABULARY = 8192

SICLIP_TINY = Spec(
    original="the same with standard blocks",
    config={
        "embed_dim": 256,
        "vision_cfg": {"timm_model_name": "siclip_tiny_trunk", "image_size": 48},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": _TINY_VOCABULARY,
            "width": 256,
            "heads": 8,
            "layers": 2,
        },
        "custom_text": True,
    },
    simplify={"gamma": {"text": 0.3}},
    preprocess={},
    augment="affine",
    vocabulary=_TINY_VOCABULARY,
    channels_last=True,
)
# The net and the token embeddings can be inherited and define both widths. A step at 48 px takes about 0.7 of the time of
# one at 64 px, and retrieval on the emoji loses 1 to 3 points.
SICLIP_LITE0 = Spec(
    original="the same with standard blocks",
    config={
        "embed_dim": 256,
        "vision_cfg": {"timm_model_name": "siclip_lite0_trunk", "image_size": 48},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 30522,
            "width": 384,
            "heads": 12,
            "layers": 2,
            "mlp_ratio": 2.0,
            "pool_type": "eos",
            "eos_id": 102,  # [SEP]
        },
        "custom_text": True,
    },
    simplify={"gamma": {"text": 0.3}},
    preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    augment="affine",
    vocabulary=weights.minilm_tokenizer,
    channels_last=True,
    origins={
        "efficientnet-lite0": {"": "visual.trunk.patch_embed.backbone."},
        "minilm": {"embeddings.word_embeddings.": "text.token_embedding."},
    },
)
