"""Writes models of open_clip as folders of transformers' CLIPModel or SiglipModel.

transformers has two kinds of towers: OpenAI's ViT with a causal text tower (CLIPModel), and
SigLIP's (SiglipModel). Each written folder is compared with the model, in tokens and in features.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip import CLIP
from open_clip.model import get_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from open_clip.utils import to_2tuple
from tokenizers import Regex, normalizers
from torch import Tensor, nn

from simplclip.common.errors import InputError, first_line

TEXTS = ("a photo of a cat", "", "Two Dogs!  on a beach_walk; the cat's no. 7", 90 * "words ")
TOLERANCE = 1e-5  # of features of length 1

# Patterns in open_clip's names of weights, and what transformers calls them.
_NAMES = {
    r"^visual\.proj$": "visual_projection.weight",
    r"^(text\.)?text_projection$": "text_projection.weight",
    r"^text\.text_projection\.": "text_model.head.",
    r"^visual\.(trunk\.)?": "vision_model.",
    r"^(text\.)?(?=token_|positional_|transformer|ln_final)": "text_model.",
    r"\.attn_pool\.latent": ".head.probe",
    r"\.attn_pool\.(q|kv)\.": ".head.attention.in_proj_",
    r"\.attn_pool\.proj\.": ".head.attention.out_proj.",
    r"\.attn_pool\.norm\.": ".head.layernorm.",
    r"\.attn_pool\.mlp\.": ".head.mlp.",
    r"\.(transformer\.resblocks|blocks)\.": ".encoder.layers.",
    r"\.(ln_|norm)([12])\.": r".layer_norm\2.",
    r"\.attn\.(in_proj_|qkv\.)": ".self_attn.qkv_proj.",
    r"\.attn\.(out_)?proj\.": ".self_attn.out_proj.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
    r"\.(class|token)_embedding": r".embeddings.\1_embedding",
    r"\.(positional_embedding|pos_embed)$": ".embeddings.position_embedding.weight",
    r"\.(conv1|patch_embed\.proj)\.": ".embeddings.patch_embedding.",
    r"\.ln_pre\.": ".pre_layrnorm.",  # transformers' spelling
    r"^vision_model\.(ln_post|norm)\.": "vision_model.post_layernorm.",
    r"\.ln_final\.": ".final_layer_norm.",
}
# open_clip's canonical texts: words in lower case, no punctuation
_CANONICAL = (
    normalizers.Replace("_", " "),
    normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Strip(),
)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes an open_clip model, its tokenizer and its preprocessing to a folder for transformers.

    tokenizer: the model's, of open_clip. Raises InputError, which names what transformers lacks:
    towers or blocks of another kind, a weight, a way to resize pictures or to clean texts.
    """
    text = model if isinstance(model, CLIP) else model.text
    image = getattr(model.visual, "trunk", model.visual)
    if not isinstance(text, CLIP | TextTransformer):
        raise _refused("text tower", text)
    if isinstance(image, VisionTransformer):
        kind, image_blocks = "CLIP", image.transformer.resblocks
    elif getattr(image, "attn_pool", None) is not None:
        kind, image_blocks = "Siglip", image.blocks
    else:
        raise _refused("image tower", image)

    weights = _renamed(model.state_dict())
    preprocess = get_model_preprocess_cfg(model)
    of_image = _tower(weights, "vision_model.", image_blocks)
    of_image["patch_size"] = weights["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    of_image["image_size"] = to_2tuple(preprocess["size"])[0]
    hf_tokenizer = _tokenizer(kind, tokenizer, model.context_length)
    of_text = _tower(weights, "text_model.", text.transformer.resblocks)
    of_text |= {"vocab_size": model.vocab_size, "max_position_embeddings": model.context_length}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        of_text[name] = getattr(hf_tokenizer, name)
    options: dict[str, Any] = {}
    if kind == "CLIP" and "text_projection.weight" in weights:
        options["projection_dim"] = len(weights["text_projection.weight"])
    elif "text_model.head.weight" in weights:
        of_text["projection_size"] = len(weights["text_model.head.weight"])
    config = getattr(transformers, f"{kind}Config")
    other = getattr(transformers, f"{kind}Model")(
        config(text_config=of_text, vision_config=of_image, **options)
    )
    _load(other, weights)
    for part in (other, hf_tokenizer, _image_processor(kind, preprocess)):
        part.save_pretrained(folder)
    _compare(model, tokenizer, folder)


def _refused(name: str, module: nn.Module) -> InputError:
    """Returns the error for a part of a model that transformers lacks."""
    return InputError(
        f"{name}: expected one of transformers' CLIPModel or SiglipModel (a ViT that is not "
        f"simplified), got {type(module).__name__}"
    )


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights by transformers' names; of attention q, k and v are taken apart."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        if ".qkv_proj." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                weights[name.replace(".qkv_proj.", f".{part}_proj.")] = piece
        elif name.endswith("_projection.weight"):
            weights[name] = tensor.T
        # timm's q and [k|v] of the pooling, in this order, are one matrix
        elif name in weights:
            weights[name] = torch.cat([weights[name], tensor])
        else:
            weights[name] = tensor
    return weights


def _tower(weights: Mapping[str, Tensor], prefix: str, blocks: nn.Sequential) -> dict[str, Any]:
    """Returns the sizes of a tower's transformer, as transformers' configuration names them."""
    block: Any = blocks[0]
    activation = [m for m in block.modules() if isinstance(m, nn.GELU | QuickGELU)]
    first = f"{prefix}encoder.layers.0."
    if not activation or f"{first}self_attn.q_proj.weight" not in weights:
        raise _refused("blocks", block)
    name = "quick_gelu"
    if isinstance(activation[0], nn.GELU):
        name = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[activation[0].approximate]
    hidden, width = weights[f"{first}mlp.fc1.weight"].shape
    norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": name,
        "layer_norm_eps": norm.eps,
    }


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies the weights to transformers' model; raises InputError if names or sizes differ."""
    state = model.state_dict()
    try:
        model.load_state_dict(
            {name: tensor.reshape(state[name].shape) for name, tensor in weights.items()}
        )
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"model: expected the weights of transformers' {type(model).__name__}, got others: "
            f"{first_line(error)}"
        ) from None


def _image_processor(kind: str, preprocess: Mapping[str, Any]) -> Any:
    """Returns transformers' image processor for open_clip's preprocessing."""
    side = to_2tuple(preprocess["size"])[0]
    square = {"height": side, "width": side}
    options = {
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
        "resample": {"bicubic": 3, "bilinear": 2}[preprocess["interpolation"]],
    }
    if preprocess["resize_mode"] == "squash":
        options |= {"size": square, "do_center_crop": False}
    elif preprocess["resize_mode"] == "shortest":
        options |= {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    else:
        raise InputError(
            f"resize_mode: expected shortest or squash, got {preprocess['resize_mode']}"
        )
    return getattr(transformers, f"{kind}ImageProcessor")(**options)


def _tokenizer(kind: str, tokenizer: Any, length: int) -> Any:
    """Returns transformers' tokenizer for one of open_clip, which cleans texts in the same way."""
    if isinstance(tokenizer, SimpleTokenizer):
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {names.get(word, word): i for word, i in tokenizer.encoder.items()}
        merges = [pair for pair in tokenizer.bpe_ranks if len(pair) == 2]
        return transformers.CLIPTokenizer(vocabulary, merges, model_max_length=length)
    if not isinstance(tokenizer, HFTokenizer) or kind == "CLIP":
        raise InputError(
            f"tokenizer: expected CLIP's, or for SigLIP one of Hugging Face, got "
            f"{type(tokenizer).__name__}"
        )
    hf_tokenizer = tokenizer.tokenizer
    backend = copy.deepcopy(hf_tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    if tokenizer.clean_fn is get_clean_fn("canonicalize"):
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*_CANONICAL, *own])
    # the class of hf_tokenizer would make a normalizer of its own when it is loaded
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=["input_ids"],  # SigLIP attends to padding
        **hf_tokenizer.special_tokens_map,
    )


@torch.no_grad()
def _compare(model: Any, tokenizer: Any, folder: Path) -> None:
    """Raises InputError unless the folder's model has the same tokens and features."""
    other = transformers.AutoModel.from_pretrained(folder).eval()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(TEXTS))
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = hf_tokenizer(list(TEXTS), **padded)["input_ids"]
    compared = ids
    if isinstance(tokenizer, SimpleTokenizer):  # it pads with 0, and the end has the highest number
        padding = torch.arange(ids.shape[1]) > ids.argmax(-1, keepdim=True)
        compared = ids.masked_fill(padding, 0)
    if not torch.equal(compared, tokens):
        raise InputError("tokenizer: expected one whose tokens transformers makes, got others")
    size = other.config.vision_config.image_size
    pixels = torch.randn(len(TEXTS), 3, size, size, generator=torch.Generator().manual_seed(0))
    results = other(input_ids=ids, pixel_values=pixels)
    model.eval()
    for name, result, expected in (
        ("image", results.image_embeds, model.encode_image(pixels, normalize=True)),
        ("text", results.text_embeds, model.encode_text(tokens, normalize=True)),
    ):
        difference = (result - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise InputError(
                f"{name} tower: expected the features of transformers' {type(other).__name__}, "
                f"got others: they differ by {difference:.1e}"
            )
