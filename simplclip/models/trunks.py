"""The image trunks of siclip-tiny and siclip-lite0, registered with timm so that open_clip's TimmModel can build them.

Each is a convolutional net under a timm VisionTransformer, whose blocks `simplify` replaces. There are no pretrained
weights of a whole trunk; siclip_lite0_trunk can `inherit` its net.
"""

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

_CFG = {"num_classes": 0, "input_size": (3, 48, 48)}
default_cfgs = generate_default_cfgs({"siclip_tiny_trunk.untrained": _CFG, "siclip_lite0_trunk.untrained": _CFG})


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-tiny before it is simplified: a residual conv net of stride 8 under a one-block ViT.

    Its norms are group norms of one group, which know nothing of other images: a batch may be computed in parts.
    """
    # The first stages take most of the time, so they have one residual block each and few channels.
    stages = tuple(ByoBlockCfg(type="basic", d=1, c=c, s=s, br=1.0) for c, s in ((32, 1), (64, 2), (128, 2)))
    config = ByoModelCfg(blocks=stages, stem_chs=32, stem_type="3x3", stem_pool="", norm_layer="groupnorm1")
    net = ByobNet(config, num_classes=0, global_pool="")
    net.register_load_state_dict_pre_hook(_refuse_batch_norms)
    return _vit("siclip_tiny_trunk", pretrained, net, {"depth": 1} | kwargs)


@register_model
def siclip_lite0_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-lite0 before it is simplified: the first five of EfficientNet-Lite0's seven stages under a ViT.

    The stages have stride 16 and 112 channels. The net is ``patch_embed.backbone``, with the names of timm's
    tf_efficientnet_lite0: conv_stem, bn1, blocks.0 ...
    """
    whole: Any = timm.create_model("tf_efficientnet_lite0")
    net = nn.Sequential(OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:5]))
    return _vit("siclip_lite0_trunk", pretrained, net, {"depth": 2} | kwargs)


def _refuse_batch_norms(net: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if any(name.startswith(prefix) and name.endswith("running_mean") for name in state):
        raise InputError("siclip-tiny: expected weights with group norms, got those of a former version; train it again")


def _vit(name: str, pretrained: bool, net: nn.Module, options: dict[str, Any]) -> VisionTransformer:
    if pretrained:
        raise InputError(f"pretrained: expected False, since {name} has no pretrained weights, got True")
    size: dict[str, Any] = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "num_heads": 8}
    options = size | {"class_token": False, "global_pool": "avg"} | options
    return build_model_with_cfg(VisionTransformer, name, False, embed_layer=partial(HybridEmbed, backbone=net), **options)
