"""MobileCLIP-S0: timm's fastvit_mci0 beside a text tower of convolutional and transformer blocks.

    model = simplclip.models.create("mobileclip-s0", checkpoint="mobileclip_s0.pt")

`from_published` renames the tensors of the published checkpoint (arXiv 2311.17049) to the names
here: open_clip does so for MobileCLIP-S1, whose text tower has no RepMixer blocks. Each of the 893
tensors becomes one of the 893 here. The published image projection has no bias.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.convert import convert_mobile_clip_state_dict
from open_clip.model import CustomTextCLIP
from open_clip.transformer import TextTransformer
from timm.layers import ConvNormAct, Mlp
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# a tensor that published checkpoints of MobileCLIP have
_PUBLISHED = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
# parts of the two RepMixer blocks; open_clip renames the rest
_RENAMED = {
    "token_mixer.layer_scale": "mixer.layer_scale",
    "token_mixer.norm.rbr_skip": "mixer.norm",
    "token_mixer.mixer.rbr_skip": "mixer.skip",
    "token_mixer.mixer.rbr_conv.0": "mixer.conv",
    "convffn.conv": "conv",
    "convffn.fc": "mlp.fc",
}


def _conv_norm(width: int) -> ConvNormAct:
    """Returns a depthwise convolution over 11 tokens and a batch norm: [B, C, 1, L] -> the same."""
    shape: Any = (1, 11)
    return ConvNormAct(width, width, shape, padding=(0, 5), groups=width, apply_act=False)


class RepMixer(nn.Module):
    """Mixes tokens x [B, C, 1, L]: ``x + layer_scale (skip(x) + conv(x) - norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-5))
        self.norm, self.skip = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv = _conv_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns mixed tokens [B, C, 1, L]; in training it updates the norms' statistics."""
        return x + self.layer_scale * (self.skip(x) + self.conv(x) - self.norm(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Returns a depthwise convolution that computes the same in eval mode.

        timm puts it in the place of this module, whose own tensors become float64.
        """
        dtype = self.layer_scale.dtype
        self.double()  # differences of the responses would lose digits
        conv = fuse_conv_bn_eval(self.conv.conv, self.conv.bn)
        impulse = torch.zeros_like(conv.weight.transpose(0, 1))  # [1, C, 1, K]
        shift = self(impulse)
        impulse[..., impulse.shape[-1] // 2] = 1
        # The response to an impulse is the mirrored kernel.
        conv.weight.copy_((self(impulse) - shift).flip(-1).transpose(0, 1))
        conv.bias.copy_(shift[0, :, 0, 0])
        return conv.to(dtype)


class RepMixerBlock(nn.Module):
    """A RepMixer and a convolutional MLP: [B, L, C] -> [B, L, C], or -> [B, C] of chosen tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = RepMixer(width)
        self.conv = _conv_norm(width)
        self.mlp = Mlp(width, 4 * width)
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor, token: Tensor | None = None) -> Tensor:
        """Returns [B, L, C] for tokens x [B, L, C], or [B, C] of one token of each text.

        token: the index of that token, int64 [B]; None for all tokens.
        """
        mixed = self.mixer(x.transpose(1, 2).unsqueeze(2))  # [B, C, 1, L]
        x = mixed.squeeze(2).transpose(1, 2)
        hidden = self.conv(mixed).squeeze(2).transpose(1, 2)
        if token is not None:
            # len(x) would fix the batch size in an export
            rows = torch.arange(x.shape[0], device=x.device)
            x, hidden = x[rows, token], hidden[rows, token]
        return x + self.layer_scale * self.mlp(hidden)


class TextTower(TextTransformer):
    """The text tower of MobileCLIP-S0: open_clip's transformer layers between two RepMixer blocks.

    No token is masked, also none of the padding. Gradient checkpointing leaves the RepMixer blocks
    out: computed twice, a batch would count twice in the statistics of their norms.
    """

    def __init__(self, *, width: int, **options: Any) -> None:
        """options: of open_clip's TextTransformer. Its layers do not count the RepMixer blocks."""
        super().__init__(width=width, no_causal_mask=True, **options)
        self.first, self.last = RepMixerBlock(width), RepMixerBlock(width)

    def forward(self, text: Tensor) -> Tensor:
        """Returns features [B, output_dim], not normalised, of token ids int64 [B, L].

        The token with the highest id, the end of a text, is pooled.
        """
        x, mask = self._embeds(text)
        x = self.transformer(self.first(x), attn_mask=mask)
        # The last block's MLP, a seventh of the tower's work, is needed at only one token.
        ends = self.ln_final(self.last(x, text.argmax(1)))
        return ends @ self.text_projection.to(ends.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the layers by names, as timm's models have them. coarse: not used."""
        blocks = [(r"transformer\.resblocks\.(\d+)", None), (r"last", (99999,))]
        return {"stem": r"token_embedding|positional_embedding|first", "blocks": blocks}


def create(
    embed_dim: int, vision_cfg: Mapping[str, Any], text_cfg: Mapping[str, Any], **options: Any
) -> CustomTextCLIP:
    """Makes open_clip's CustomTextCLIP of a timm model and a `TextTower`, with random weights."""
    # open_clip's tower, which ours replaces
    placeholder = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1}
    model = CustomTextCLIP(embed_dim, dict(vision_cfg), placeholder, **options)
    model.visual.trunk.head.fc.register_parameter("bias", None)
    model.text = TextTower(output_dim=embed_dim, **text_cfg)
    model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    return model


def from_published(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict of the published layout by the names of `model`, in a new dict.

    One of another layout keeps its names, and so does any if the model has no `TextTower`.
    """
    tower = getattr(model, "text", None)
    if _PUBLISHED not in state or not isinstance(tower, TextTower):
        return dict(state)
    places = {0: "first", len(tower.transformer.resblocks) + 1: "last"}
    renamed = {}
    for name, value in convert_mobile_clip_state_dict(model, state).items():
        if match := re.match(r"text\.transformer\.resblocks\.(\d+)\.(.*)", name):
            number, rest = int(match[1]), match[2]
            for old, new in _RENAMED.items():
                rest = rest.replace(old, new)
            if rest in ("mlp.fc1.weight", "mlp.fc2.weight", "layer_scale"):
                value = value.squeeze()
            place = places.get(number, f"transformer.resblocks.{number - 1}")
            name = f"text.{place}.{rest}"
        renamed[name] = value
    del renamed["visual.trunk.head.fc.bias"]  # zeros, which timm adds
    return renamed
