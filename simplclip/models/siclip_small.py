"""Image trunks and tokenizers of siclip-tiny and siclip-lite0.

Each trunk is a convolutional net under a timm VisionTransformer, whose blocks `simplify` replaces.
The trunks are registered with timm, so that open_clip's TimmModel can build them.
siclip_lite0_trunk can `inherit` its net.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import timm
import torch
from open_clip.tokenizer import SimpleTokenizer
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from simplclip.models.weights import minilm_folder

_CFG = {"num_classes": 0, "input_size": (3, 48, 48)}
default_cfgs = generate_default_cfgs(
    {"siclip_tiny_trunk.untrained": _CFG, "siclip_lite0_trunk.untrained": _CFG}
)


@register_model
def siclip_tiny_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns the image trunk of siclip-tiny before it is simplified; timm registers it by name.

    It is a residual conv net of stride 8 under a ViT of one block. Its norms are group norms of one
    group, which know nothing of other images: a batch may be computed in parts. pretrained: False,
    there are no weights. kwargs: timm's, of a VisionTransformer.
    """
    # The first stages take most of the time, so they have one residual block each and few channels.
    stages = tuple(
        ByoBlockCfg(type="basic", d=1, c=c, s=s, br=1.0) for c, s in ((32, 1), (64, 2), (128, 2))
    )
    config = ByoModelCfg(
        blocks=stages, stem_chs=32, stem_type="3x3", stem_pool="", norm_layer="groupnorm1"
    )
    net = ByobNet(config, num_classes=0, global_pool="")
    return _vit("siclip_tiny_trunk", pretrained, net, {"depth": 1} | kwargs)


@register_model
def siclip_lite0_trunk(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Returns the image trunk of siclip-lite0 before it is simplified; timm registers it by name.

    It is the first five of EfficientNet-Lite0's seven stages under a ViT. The stages have stride 16
    and 112 channels. The net is ``patch_embed.backbone``, with the names of timm's
    tf_efficientnet_lite0: conv_stem, bn1, blocks.0 ... pretrained: False, there are no weights.
    kwargs: timm's, of a VisionTransformer, in place of the defaults: 48 px, two blocks of width 256
    with 8 heads, average pooling.
    """
    whole: Any = timm.create_model("tf_efficientnet_lite0")
    net = nn.Sequential(
        OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:5])
    )
    return _vit("siclip_lite0_trunk", pretrained, net, {"depth": 2} | kwargs)


def _vit(name: str, pretrained: bool, net: nn.Module, options: dict[str, Any]) -> VisionTransformer:
    """Builds timm's VisionTransformer over the feature map of a conv net, with random weights.

    name: the registered trunk's. pretrained: False. net: [B, 3, S, S] -> [B, C', H, W], whose
    positions are the tokens. options: arguments of VisionTransformer, before the defaults here (48
    px, width 256, 8 heads, average pooling).
    """
    size: dict[str, Any] = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "num_heads": 8}
    options = size | {"class_token": False, "global_pool": "avg"} | options
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        embed_layer=partial(HybridEmbed, backbone=net),
        **options,
    )


class ShortVocabTokenizer(SimpleTokenizer):
    """open_clip's tokenizer with only the first (most frequent) merges of its vocabulary.

    Rare words are split into more pieces, and a small model needs no embedding of 49,408 tokens.
    Start and end of text remain the two highest ids, as CLIP's pooling needs.
    """

    bpe_ranks: dict[tuple[str, str], int]
    encoder: dict[str, int]

    def __init__(self, vocab_size: int, context_length: int = 77) -> None:
        """Makes a tokenizer of vocab_size ids, at least 514, whose texts have context_length."""
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


@cache
def minilm_tokenizer(context_length: int) -> Callable[..., Tensor]:
    """Returns MiniLM's WordPiece tokenizer: texts -> int64 [B, context_length].

    A text is [CLS] ... [SEP], padded by 0. Longer texts are truncated and still end in [SEP]. It is
    cached, one for each length. Reads a file of an installed package (ModuleNotFoundError without
    it) and sets TOKENIZERS_PARALLELISM=false in the environment unless it is set.
    """
    from tokenizers import Tokenizer

    # With threads the tokenizer would warn or hang in a forked loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    length = context_length
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def tokenize(texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Returns token ids int64 [B, L] of texts or one text; context_length: another L."""
        if context_length not in (None, length):
            return minilm_tokenizer(context_length)(texts)
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        return torch.tensor(ids, dtype=torch.int64)

    return tokenize
