"""Image trunks of the small SiCLIPs, registered with timm so that open_clip's TimmModel can build them.

Each is a convolutional net under a timm VisionTransformer, whose blocks `simplify` replaces. There are no
pretrained weights of a whole trunk; siclip_lite0_trunk can `inherit` its net.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import timm
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from simplclip.common.errors import InputError

__all__ = ["siclip_lite0_trunk", "siclip_tiny_trunk"]

default_cfgs = generate_default_cfgs(
    {
        "siclip_tiny_trunk.untrained": {"num_classes": 0, "input_size": (3, 48, 48)},
        "siclip_lite0_trunk.untrained": {"num_classes": 0, "input_size": (3, 48, 48)},
    }
)


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-tiny before it is simplified: a residual conv net of stride 8 under a one-block ViT."""
    # The first stages take most of the time, so they have one residual block each and few channels.
    stages = tuple(ByoBlockCfg(type="basic", d=1, c=c, s=s, br=1.0) for c, s in ((32, 1), (64, 2), (128, 2)))
    net = ByobNet(ByoModelCfg(blocks=stages, stem_chs=32, stem_type="3x3", stem_pool=""), num_classes=0, global_pool="")
    options = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "depth": 1, "num_heads": 8}
    return _vit("siclip_tiny_trunk", pretrained, net, options | kwargs)


@register_model
def siclip_lite0_trunk(pretrained: bool = False, stages: int = 5, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-lite0 before it is simplified: the first stages of EfficientNet-Lite0 under a ViT.

    stages: how many of the seven to keep; 5 has stride 16 and 112 channels. The net is ``patch_embed.backbone``, with
    the names of timm's tf_efficientnet_lite0: conv_stem, bn1, blocks.0 ...
    """
    whole = timm.create_model("tf_efficientnet_lite0")
    if not 1 <= stages <= len(whole.blocks):
        raise InputError(f"stages: expected 1 to {len(whole.blocks)}, got {stages}")
    net = nn.Sequential(OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:stages]))
    options = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "depth": 2, "num_heads": 8}
    return _vit("siclip_lite0_trunk", pretrained, net, options | kwargs)


def _vit(name: str, pretrained: bool, net: nn.Module, options: dict[str, Any]) -> VisionTransformer:
    if pretrained:
        raise InputError(f"pretrained: expected False, since {name} has no pretrained weights, got True")
    options = {"class_token": False, "global_pool": "avg"} | options
    return build_model_with_cfg(VisionTransformer, name, False, embed_layer=partial(HybridEmbed, backbone=net), **options)
