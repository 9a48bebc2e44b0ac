"""The small SiCLIPs of the demo, which `simplclip.models` finds by entry points, and their image trunks.

The trunks are registered with timm so that open_clip's TimmModel can build them. Each is a convolutional net under a timm
VisionTransformer, whose blocks `simplify` replaces. There are no pretrained weights of a whole trunk; siclip_lite0_trunk can
`inherit` its net.
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
from simplclip.demo import weights
from simplclip.models.registry import Spec

_CFG = {"num_classes": 0, "input_size": (3, 48, 48)}
default_cfgs = generate_default_cfgs({"siclip_tiny_trunk.untrained": _CFG, "siclip_lite0_trunk.untrained": _CFG})


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-tiny before it is simplified: a residual conv net of stride 8 under a one-block ViT."""
    # The first stages take most of the time, so they have one residual block each and few channels.
    stages = tuple(ByoBlockCfg(type="basic", d=1, c=c, s=s, br=1.0) for c, s in ((32, 1), (64, 2), (128, 2)))
    net = ByobNet(ByoModelCfg(blocks=stages, stem_chs=32, stem_type="3x3", stem_pool=""), num_classes=0, global_pool="")
    return _vit("siclip_tiny_trunk", pretrained, net, {"depth": 1} | kwargs)


@register_model
def siclip_lite0_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Image trunk of siclip-lite0 before it is simplified: the first five of EfficientNet-Lite0's seven stages under a ViT.

    The stages have stride 16 and 112 channels. The net is ``patch_embed.backbone``, with the names of timm's
    tf_efficientnet_lite0: conv_stem, bn1, blocks.0 ...
    """
    whole = timm.create_model("tf_efficientnet_lite0")
    net = nn.Sequential(OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:5]))
    return _vit("siclip_lite0_trunk", pretrained, net, {"depth": 2} | kwargs)


def _vit(name: str, pretrained: bool, net: nn.Module, options: dict[str, Any]) -> VisionTransformer:
    if pretrained:
        raise InputError(f"pretrained: expected False, since {name} has no pretrained weights, got True")
    size = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "num_heads": 8}
    options = size | {"class_token": False, "global_pool": "avg"} | options
    return build_model_with_cfg(VisionTransformer, name, False, embed_layer=partial(HybridEmbed, backbone=net), **options)


def _small(trunk: str, text: dict[str, Any], **others: Any) -> Spec:
    config = {
        "embed_dim": 256,
        "vision_cfg": {"timm_model_name": trunk, "image_size": 48},
        "text_cfg": {"context_length": 16, "layers": 2, **text},
        "custom_text": True,
    }
    original, simplify = "the same with standard blocks", {"gamma": {"text": 0.3}}
    return Spec(original, config, simplify, augment="affine", channels_last=True, **others)


SICLIP_TINY = _small("siclip_tiny_trunk", {"vocab_size": 8192, "width": 256, "heads": 8}, preprocess={}, vocabulary=8192)
# The net and the token embeddings, which can be inherited, define both widths. A step at 48 px takes about 0.7 of the time of
# a step at 64 px, and retrieval on the emoji loses 1 to 3 points.
SICLIP_LITE0 = _small(
    "siclip_lite0_trunk",
    # eos_id: [SEP]
    {"vocab_size": 30522, "width": 384, "heads": 12, "mlp_ratio": 2.0, "pool_type": "eos", "eos_id": 102},
    preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    vocabulary=weights.minilm_tokenizer,
    origins={
        "efficientnet-lite0": {"": "visual.trunk.patch_embed.backbone."},
        "minilm": {"embeddings.word_embeddings.": "text.token_embedding."},
    },
)
