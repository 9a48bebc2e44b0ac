"""What small SiCLIPs have in common: images of 48 x 48, 16 tokens, a ViT over a convolutional net.

The trunks are registered with timm, so that open_clip's TimmModel can build them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from simplclip.models.spec import Spec, Tokenizer

# timm's configuration of a trunk, for `generate_default_cfgs`
TRUNK_CFG = {"num_classes": 0, "input_size": (3, 48, 48)}


def small_spec(
    trunk: str,
    text: Mapping[str, Any],
    tokenizer: Callable[..., Tokenizer],
    preprocess: Mapping[str, Any] | None = None,
) -> Spec:
    """Returns the recipe of a small SiCLIP: images of 48 x 48, 16 tokens, D = 256.

    trunk: the name of a timm model that `vit_over` makes. text: open_clip's text_cfg beside length
    and layers. tokenizer, preprocess: as in `Spec`; None means open_clip's preprocessing.
    """
    return Spec(
        config={
            "embed_dim": 256,
            "vision_cfg": {"timm_model_name": trunk, "image_size": 48},
            "text_cfg": {"context_length": 16, "layers": 2, **text},
            "custom_text": True,
        },
        tokenizer=tokenizer,
        simplify={"gamma": {"text": 0.3}},
        preprocess=preprocess or {},
        augment="affine",
        channels_last=True,
    )


def vit_over(
    net: nn.Module, name: str, pretrained: bool, options: Mapping[str, Any]
) -> VisionTransformer:
    """Builds timm's VisionTransformer over the feature map of a conv net, with random weights.

    net: [B, 3, S, S] -> [B, C', H, W], whose positions are the tokens. name: the registered
    trunk's. pretrained: False. options: arguments of VisionTransformer, before the defaults here.
    """
    size: dict[str, Any] = {"img_size": 48, "patch_size": 1, "embed_dim": 256, "num_heads": 8}
    options = size | {"class_token": False, "global_pool": "avg"} | dict(options)
    embed = partial(HybridEmbed, backbone=net)
    vit: VisionTransformer = build_model_with_cfg(
        VisionTransformer, name, pretrained, embed_layer=embed, **options
    )
    return vit


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
