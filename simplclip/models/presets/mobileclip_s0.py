"""mobileclip-s0: MobileCLIP-S0 with its own blocks, which siclip-s0 is a student of."""

import open_clip

from simplclip.models import mobileclip
from simplclip.models.spec import Spec

SPEC = Spec(
    config={
        "embed_dim": 512,
        "vision_cfg": open_clip.get_model_config("MobileCLIP2-S0")["vision_cfg"],
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 4,
        },
    },
    preprocess={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
    build=mobileclip.create,
)
