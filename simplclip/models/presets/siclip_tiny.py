"""siclip-tiny: a small model to train from scratch."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer

from simplclip.models.small import TRUNK_CFG, ShortVocabTokenizer, small_spec, vit_over

default_cfgs = generate_default_cfgs({"siclip_tiny_trunk.untrained": TRUNK_CFG})


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns the image trunk before it is simplified; timm registers it by name.

    It is a residual conv net of stride 8 under a ViT of one block. Its norms are group norms of one
    group, which know nothing of other images: a batch may be computed in parts.
    """
    # The first stages take most of the time, so they have one residual block each and few channels.
    stages = tuple(
        ByoBlockCfg(type="basic", d=1, c=c, s=s, br=1.0) for c, s in ((32, 1), (64, 2), (128, 2))
    )
    config = ByoModelCfg(
        blocks=stages, stem_chs=32, stem_type="3x3", stem_pool="", norm_layer="groupnorm1"
    )
    net = ByobNet(config, num_classes=0, global_pool="")
    return vit_over(net, "siclip_tiny_trunk", pretrained, {"depth": 1} | kwargs)


SPEC = small_spec(
    "siclip_tiny_trunk",
    {"vocab_size": 8192, "width": 256, "heads": 8},
    tokenizer=partial(ShortVocabTokenizer, 8192),
)
