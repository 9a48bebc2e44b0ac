"""Places of a model's blocks that `simplify` can replace, and the blocks that it puts there."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, Transformer
from timm.layers import DropPath
from timm.models.fastvit import AttentionBlock
from timm.models.vision_transformer import Block
from torch import nn

from simplclip.common.errors import InputError
from simplclip.models.blocks import MapBlock, TimmBlock, TransformerBlock, is_causal_mask
from simplclip.models.towers import tower_of
from simplclip.nn import ACTIVATIONS, SimplifiedBlock
from simplclip.ops.modes import has_values

# Class of an activation -> its name in `nn.ACTIVATIONS`; nn.GELU may also be "gelu_tanh".
_ACT_NAMES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quickgelu",
    "ReLU": "relu",
    "SiLU": "silu",
    # of transformers
    "GELUActivation": "gelu",
    "QuickGELUActivation": "quickgelu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}


@dataclass(frozen=True)
class Site:
    """A block that can be replaced.

    cls, options: the class of its replacement, and the arguments that depend on the tower.
    """

    path: str
    block: nn.Module
    cls: type[SimplifiedBlock]
    options: dict[str, Any] = field(default_factory=dict)
    masks_padding: bool = False


def block_sites(model: nn.Module, tower: str) -> list[Site]:
    """Returns the blocks of a tower, "text" or "image", that `simplify` can replace, by index."""
    encoders = module_for_transformers(model)
    if encoders is not None:
        return [Site(*layer) for layer in encoders.encoder_layers(model, tower)]
    return list(_text_sites(model) if tower == "text" else _image_sites(model))


def module_for_transformers(model: nn.Module) -> ModuleType | None:
    """Returns the module `hugging_face`, imported then, for a model of transformers, else None."""
    # imported already if `model` is of transformers
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    from simplclip.models import hugging_face

    return hugging_face


def _text_sites(model: nn.Module) -> Iterable[Site]:
    """Returns the sites of the text tower in order; InputError for one that does not fit."""
    tower: Any = getattr(model, "text", None)
    path = "text.transformer"
    if tower is None:  # open_clip's CLIP is its own text tower
        tower = model
        path = "transformer"
    transformer = getattr(tower, "transformer", None)
    if not isinstance(transformer, Transformer):
        raise InputError(
            "text: expected open_clip's text transformer, got "
            f"{type(transformer or tower).__name__}"
        )
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        raise InputError(
            "text: expected no mask or a causal one, got a tower with class token or padding masks"
        )
    mask = tower.attn_mask
    if mask is not None and has_values(mask) and not is_causal_mask(mask):
        raise InputError(
            "text: expected no mask or a causal one, got a tower with another attn_mask"
        )
    masks_padding = getattr(tower, "masks_padding", False)
    return _transformer_sites(transformer, path, mask is not None, masks_padding)


def _image_sites(model: nn.Module) -> Iterable[Site]:
    """Returns the sites of the image tower in order; InputError without any."""
    visual: Any = getattr(model, "visual", None)
    if visual is None:
        raise InputError(
            f"image: expected a model with a tower visual, got {type(model).__name__} without one"
        )
    transformer = getattr(visual, "transformer", None)
    if isinstance(transformer, Transformer):
        return _transformer_sites(transformer, "visual.transformer")
    # Subclasses may change the signature or the attention, so only the exact classes are known to
    # fit. A simplified block of an earlier call keeps its index and can be replaced again.
    classes: dict[type, type[SimplifiedBlock]] = {Block: TimmBlock, AttentionBlock: MapBlock}
    modules = dict(visual.named_modules(prefix="visual"))
    for module in modules.values():
        if isinstance(module, SimplifiedBlock):
            classes[type(module)] = type(module)
    sites = [
        Site(path, module, classes[type(module)])
        for path, module in modules.items()
        if type(module) in classes
    ]
    if not sites:
        got = type(getattr(visual, "trunk", visual)).__name__
        raise InputError(
            "image: expected blocks of open_clip's VisionTransformer, timm's VisionTransformer or "
            f"FastViT, got {got} without any"
        )
    return sites


def _transformer_sites(
    transformer: Transformer, path: str, causal: bool = False, masks_padding: bool = False
) -> Iterator[Site]:
    """Yields the sites of open_clip's Transformer, at `path`, in order."""
    known = ResidualAttentionBlock | CustomResidualAttentionBlock | SimplifiedBlock
    options = {"causal": causal}
    for index, block in enumerate(transformer.resblocks):
        if not isinstance(block, known):
            tower = tower_of(path)
            raise InputError(
                f"{tower}: expected residual attention blocks, got {type(block).__name__}"
            )
        yield Site(f"{path}.resblocks.{index}", block, TransformerBlock, options, masks_padding)


def attention_of(block: Any) -> Any:
    """Returns the attention module of a block of open_clip, timm or transformers."""
    names = ("attn", "self_attn", "token_mixer")
    return next(getattr(block, name) for name in names if hasattr(block, name))


def build_block(site: Site, mlp_ratio: float | None = None, gamma: float = 1.0) -> SimplifiedBlock:
    """Returns a new block with random weights for the place of a site; replaces nothing.

    mlp_ratio: F / C, None for that of the old block. gamma: the initial value of its gamma.
    """
    block: Any = site.block
    norm = "layernorm"
    if isinstance(block, SimplifiedBlock):
        weight = block.fc1.weight
        heads = block.heads
        norm = block.norm_name
        act = block.act
        drop_path = block.drop_path
    else:
        weight = _first_dense(block.mlp).weight
        heads = attention_of(block).num_heads
        act = _act_of(block.mlp, site.path)
        drops = (m.drop_prob for m in block.modules() if isinstance(m, DropPath))
        drop_path = next(drops, 0.0)
    hidden, width = weight.shape[:2]
    if mlp_ratio is None:
        mlp_ratio = hidden / width
    options: dict[str, Any] = {"norm": norm, "act": act, "gamma": gamma, "drop_path": drop_path}
    new: Any = site.cls(width, heads, mlp_ratio, **options, **site.options)
    if site.masks_padding:
        new.masks_padding = True
    eps = (m.eps for m in block.modules() if isinstance(m, nn.LayerNorm))
    new.norm.eps = next(eps, new.norm.eps)
    made = new.fc1.weight
    if made.device != weight.device or made.dtype != weight.dtype:  # torch cannot cast fake modules
        new.to(device=weight.device, dtype=weight.dtype)
    return new.train(block.training)


def _first_dense(mlp: nn.Module) -> nn.Linear | nn.Conv2d:
    """Returns the first layer of an MLP that mixes channels: FastViT's begins depthwise."""
    layers = (m for m in mlp.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return next(layer for layer in layers if layer.weight.shape[1] > 1)


def _act_of(mlp: Any, path: str) -> str:
    """Returns an activation's name in `nn.ACTIVATIONS`; InputError for another one."""
    # of timm, open_clip and transformers
    names = ("act", "gelu", "activation_fn")
    act = next((getattr(mlp, name) for name in names if hasattr(mlp, name)), None)
    known = _ACT_NAMES.get(type(act).__name__)
    if known is None:
        tower = "image" if path.startswith(("visual.", "vision_model.")) else "text"
        raise InputError(
            f"{tower}: expected blocks with an activation out of {tuple(ACTIVATIONS)}, got "
            f"{type(act).__name__} in {path}; towers or blocks of `simplify` can leave it out"
        )
    if known == "gelu" and getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return known
