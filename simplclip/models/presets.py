"""The recipes of this library's models; NAME.yaml beside is the config that trains a model NAME."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import open_clip
import timm
from open_clip import SimpleTokenizer
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from simplclip.models import mobileclip
from simplclip.models.packaged import minilm_tokenizer
from simplclip.nn import neighbour_groups

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Spec:
    """The recipe of a model, of which `models.create` makes it.

    config: open_clip's configuration.
    tokenizer: a function of context_length that makes the tokenizer.
    simplify: the arguments of `simplify`, or None for a model with its own blocks.
    preprocess: fields of open_clip's PreprocessCfg. augment: as of `models.transforms`.
    build: the function that makes the model of the configuration, if open_clip does not.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[..., Tokenizer] = SimpleTokenizer
    simplify: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    augment: str | Mapping[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    build: Callable[..., nn.Module] | None = None


class ShortVocabTokenizer(SimpleTokenizer):
    """open_clip's tokenizer with only the first (most frequent) merges of its vocabulary.

    Rare words are split into more pieces, and a small model needs no embedding of 49,408 tokens.
    Start and end of text remain the two highest ids, as CLIP's pooling needs.
    """

    bpe_ranks: dict[tuple[str, str], int]
    encoder: dict[str, int]

    def __init__(self, vocab_size: int, context_length: int = 77) -> None:
        """vocab_size: at least 514."""
        super().__init__(context_length=context_length)
        merges = vocab_size - 2 * len(self.byte_encoder) - 2
        self.bpe_ranks = dict(list(self.bpe_ranks.items())[:merges])
        # the cache begins with start and end of text
        pieces = [*list(self.encoder)[: vocab_size - 2], *self.cache]
        self.encoder = {piece: i for i, piece in enumerate(pieces)}
        self.decoder = dict(enumerate(pieces))
        self.vocab_size = vocab_size
        self.all_special_ids = [self.encoder[special] for special in self.cache]
        self.sot_token_id, self.eot_token_id = self.all_special_ids


def _vit_over(net: nn.Module, name: str, pretrained: bool, **options: Any) -> VisionTransformer:
    """Builds timm's VisionTransformer, by name, over a conv net [B, 3, S, S] -> [B, C', H, W]."""
    size: dict[str, Any] = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "num_heads": 8}
    options = size | {"class_token": False, "global_pool": "avg"} | options
    options["pretrained_cfg"] = {"num_classes": 0, "input_size": (3, 48, 48)}
    embed = partial(HybridEmbed, backbone=net)
    vit: VisionTransformer = build_model_with_cfg(
        VisionTransformer, name, pretrained, embed_layer=embed, **options
    )
    return vit


@register_model
def siclip_lite0_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns siclip-lite0's image trunk before it is simplified; timm registers it by name.

    It is the first five of EfficientNet-Lite0's seven stages, of stride 16 and 112 channels, under
    a ViT. The net keeps the names of timm's tf_efficientnet_lite0, so that it can be inherited.
    """
    whole: Any = timm.create_model("tf_efficientnet_lite0")
    parts = OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:5])
    net = nn.Sequential(parts)
    return _vit_over(net, "siclip_lite0_trunk", pretrained, **{"depth": 2} | kwargs)


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns siclip-tiny's image trunk before it is simplified; timm registers it by name.

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
    return _vit_over(net, "siclip_tiny_trunk", pretrained, **{"depth": 1} | kwargs)


def _small(trunk: str, text: Mapping[str, Any], **options: Any) -> Spec:
    """Returns the recipe of a small SiCLIP: images of 48 x 48, 16 tokens, D = 256."""
    config = {
        "embed_dim": 256,
        "vision_cfg": {"timm_model_name": trunk, "image_size": 48},
        "text_cfg": {"context_length": 16, "layers": 2, **text},
        "custom_text": True,
    }
    blocks = {"gamma": {"text": 0.3}}
    return Spec(config, simplify=blocks, augment="affine", channels_last=True, **options)


_MOBILECLIP2 = open_clip.get_model_config("MobileCLIP2-S0")
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 4}
_MOBILECLIP = Spec(
    {"embed_dim": 512, "vision_cfg": _MOBILECLIP2["vision_cfg"], "text_cfg": _TEXT},
    preprocess={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
    build=mobileclip.create,
)
SPECS: dict[str, Spec] = {
    # MobileCLIP-S0 with its own blocks, which siclip-s0 is a student of
    "mobileclip-s0": _MOBILECLIP,
    # The demo's model, whose net and token embeddings define both widths. A step at 48 px takes
    # about 0.7 of the time of one at 64 px, and retrieval on the emoji loses 1 to 3 points.
    "siclip-lite0": _small(
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
    ),
    # The paper's model, with its share of parameters. The text blocks share nothing: each way of
    # sharing cost recall in the demo's student.
    "siclip-s0": replace(_MOBILECLIP, simplify={"share": {"image": {"attention": [[0, 1]]}}}),
    # A small model to train from scratch.
    "siclip-tiny": _small(
        "siclip_tiny_trunk",
        {"vocab_size": 8192, "width": 256, "heads": 8},
        tokenizer=partial(ShortVocabTokenizer, 8192),
    ),
    # The text tower has most of the parameters, and its neighbouring layers do nearly the same.
    # Masking padding lost no recall in a tower of this shape; siclip-s0's convolutions read it.
    "siclip2-s0": Spec(
        _MOBILECLIP2,
        partial(open_clip.get_tokenizer, "MobileCLIP2-S0"),
        simplify={"share": {"text": neighbour_groups(12, 2)}, "mask_padding": True},
        preprocess=_MOBILECLIP.preprocess,
    ),
}
