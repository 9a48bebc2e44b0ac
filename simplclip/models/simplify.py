"""Simplified blocks in models of open_clip: `simplify` replaces blocks in place.

The blocks here have the signatures of open_clip's and timm's, in whose places they stand.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
)
from timm.layers import DropPath
from timm.models.fastvit import AttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.naming import tower_of
from simplclip.nn import ACTIVATIONS, SHARED_PARTS, SimplifiedBlock, share_weights
from simplclip.ops import checks
from simplclip.ops.modes import has_values

TOWERS = ("text", "image")
Groups = Sequence[Sequence[int]]  # indices of blocks
# Class of an activation -> its name in `nn.ACTIVATIONS`; nn.GELU may also be "gelu_tanh".
_ACT_NAMES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quickgelu",
    "ReLU": "relu",
    "SiLU": "silu",
}


def is_causal_mask(mask: Tensor) -> bool:
    """Whether an additive mask [L, L], of 0 and -inf, lets token i see exactly the tokens 0..i."""
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))


class TransformerBlock(SimplifiedBlock):
    """A block of open_clip's ``Transformer``: [B, L, C]."""

    masks_padding = False

    def get_weight_dtype(self) -> torch.dtype:
        """Returns what open_clip asks for."""
        return self.fc1.weight.dtype

    def forward(
        self,
        x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the block's output [B, L, C] for x [B, L, C].

        k_x, v_x: None. attn_mask: the tower's causal mask [L, L], whose values `simplify` checked,
        for a causal block; the lengths [B] of the texts for one that masks padding; else None.
        """
        if k_x is not None or v_x is not None:
            raise InputError("k_x, v_x: expected None, got a tensor")
        shape: tuple | None = None
        if self.masks_padding:
            shape = (x.shape[0],)
        elif self.causal:
            shape = (x.shape[1], x.shape[1])
        got = None if attn_mask is None else tuple(attn_mask.shape)
        if got != shape:
            raise InputError(f"attn_mask: expected the shape {shape}, got {got}")
        return super().forward(x, attn_mask if self.masks_padding else None)


class TimmBlock(SimplifiedBlock):
    """A block of timm's ``VisionTransformer``: [B, L, C], full attention."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Returns [B, L, C] for x [B, L, C], without a mask."""
        if attn_mask is not None or is_causal:
            raise InputError("attn_mask, is_causal: expected None and False, got others")
        return super().forward(x)


class MapBlock(SimplifiedBlock):
    """A block on timm's feature maps [B, C, H, W] (FastViT): full attention over H·W positions."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        batch, width, height, breadth = x.shape
        tokens = super().forward(x.permute(0, 2, 3, 1).reshape(batch, height * breadth, width))
        return tokens.reshape(batch, height, breadth, width).permute(0, 3, 1, 2)


class MaskedTextTransformer(TextTransformer):
    """open_clip's text tower with simplified blocks that see nothing behind the end of a text."""

    masks_padding = True

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens' embeddings [B, L, C], and the lengths [B] in the place of a mask.

        They include the token that the tower pools.
        """
        ends = text if self.pool_type == "argmax" else (text == self.eos_id).int()
        return super()._embeds(text)[0], ends.argmax(1) + 1


@dataclass(frozen=True)
class Site:
    """A block that can be replaced, at `path`, and the class of its replacement."""

    path: str
    block: Any
    cls: type[SimplifiedBlock]
    causal: bool = False


def _sites(model: nn.Module, tower: str) -> list[Site]:
    """Returns the blocks of a tower, "text" or "image", that `simplify` can replace, by index."""
    return _text_sites(model) if tower == "text" else _image_sites(model)


def _text_sites(model: nn.Module) -> list[Site]:
    """Returns the sites of the text tower; InputError for one that does not fit."""
    # open_clip's CLIP is its own text tower
    tower: Any = getattr(model, "text", model)
    transformer = getattr(tower, "transformer", None)
    if not isinstance(transformer, Transformer):
        got = type(transformer or tower).__name__
        raise InputError(f"text: expected open_clip's text transformer, got {got}")
    mask = tower.attn_mask
    other_mask = mask is not None and has_values(mask) and not is_causal_mask(mask)
    has_class_token = getattr(tower, "cls_emb", None) is not None
    if other_mask or has_class_token or getattr(tower, "use_pad_mask", False):
        raise InputError(
            "text: expected no mask or a causal one, got a tower with another mask or a class token"
        )
    prefix = "transformer" if tower is model else "text.transformer"
    return _transformer_sites(transformer, prefix, mask is not None)


def _image_sites(model: nn.Module) -> list[Site]:
    """Returns the sites of the image tower; InputError without any."""
    visual: Any = getattr(model, "visual", nn.Identity())
    transformer = getattr(visual, "transformer", None)
    if isinstance(transformer, Transformer):
        return _transformer_sites(transformer, "visual.transformer")
    # Subclasses may change the signature or the attention, so only the exact classes are known to
    # fit.
    classes: dict[type, type[SimplifiedBlock]] = {Block: TimmBlock, AttentionBlock: MapBlock}
    sites = [
        Site(path, module, classes[type(module)])
        for path, module in visual.named_modules(prefix="visual")
        if type(module) in classes
    ]
    if not sites:
        got = type(getattr(visual, "trunk", visual)).__name__
        raise InputError(
            "image: expected a tower visual with blocks of open_clip's VisionTransformer, timm's "
            f"VisionTransformer or FastViT, got {got} without any"
        )
    return sites


def _transformer_sites(transformer: Transformer, path: str, causal: bool = False) -> list[Site]:
    """Returns the sites of open_clip's Transformer, which is at `path`."""
    for block in transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock | CustomResidualAttentionBlock):
            got = type(block).__name__
            raise InputError(f"{tower_of(path)}: expected residual attention blocks, got {got}")
    return [
        Site(f"{path}.resblocks.{index}", block, TransformerBlock, causal)
        for index, block in enumerate(transformer.resblocks)
    ]


def _build(site: Site, mlp_ratio: float | None = None, gamma: float = 1.0) -> SimplifiedBlock:
    """Returns a new block with random weights for the place of a site; replaces nothing.

    mlp_ratio: F / C, None for that of the old block. gamma: the initial value of its gamma.
    """
    block = site.block
    weight = _first_dense(block.mlp).weight
    hidden, width = weight.shape[:2]
    if mlp_ratio is None:
        mlp_ratio = hidden / width
    attention = block.token_mixer if isinstance(block, AttentionBlock) else block.attn
    drops = (m.drop_prob for m in block.modules() if isinstance(m, DropPath))
    new = site.cls(
        width,
        attention.num_heads,
        mlp_ratio,
        causal=site.causal,
        act=_act_of(block.mlp, site.path),
        gamma=gamma,
        drop_path=next(drops, 0.0),
    )
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
    act = mlp.gelu if hasattr(mlp, "gelu") else mlp.act  # of open_clip and of timm
    known = _ACT_NAMES.get(type(act).__name__)
    if known is None:
        raise InputError(
            f"{tower_of(path)}: expected blocks with an activation out of {tuple(ACTIVATIONS)}, "
            f"got {type(act).__name__} in {path}; towers or blocks of `simplify` can leave it out"
        )
    if known == "gelu" and getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return known


@dataclass(frozen=True)
class SimplifyReport:
    """The result of `simplify`.

    replaced: the path of each replaced block -> its former type.
    before, after: the parameters, see `count_parameters`.
    """

    replaced: Mapping[str, str]
    before: Mapping[str, int]
    after: Mapping[str, int]

    def __str__(self) -> str:
        """Returns lines: the replaced blocks, and the parameters of each part now and before."""
        lines = [f"{len(self.replaced)} blocks replaced: {', '.join(self.replaced)}"]
        for part, size in self.after.items():
            lines.append(f"{part}: {size:,} parameters, {self.before[part]:,} before")
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the parameters of "image", "text", "other" (scale, bias, decoder), and in "total"."""
    named = list(model.named_parameters(remove_duplicate=False))
    every = {p for _, p in named}
    image = {p for name, p in named if name.startswith("visual")}
    other = {p for name, p in named if name.startswith(("logit_", "text_decoder."))}
    parts = {"image": image, "text": every - image - other, "other": other, "total": every}
    return {part: sum(p.numel() for p in parameters) for part, parameters in parts.items()}


def simplify(
    model: nn.Module,
    *,
    towers: Sequence[str] = TOWERS,
    blocks: Mapping[str, Sequence[int]] | None = None,
    share: Mapping[str, Groups | Mapping[str, Groups]] | None = None,
    mlp_ratio: float | Mapping[str, float] | None = None,
    gamma: float | Mapping[str, float] = 1.0,
    mask_padding: bool = False,
    init: str = "random",
) -> tuple[nn.Module, SimplifyReport]:
    """Replaces blocks of an open_clip model by simplified ones (SAS-P), in place.

    This works on the text transformer of CLIP and CustomTextCLIP, MobileCLIP-S0's, open_clip's
    VisionTransformer, and the attention blocks of timm's VisionTransformer and FastViT. New blocks
    have the old blocks' activation, eps of the norm, drop path, dtype, device and mode. A causal
    mask is recognised and kept. Gains replace layer scale.

    Args:
        towers: "text", "image" or both.
        blocks: for each tower the indices of the attention blocks to replace, by default all.
        share: for each tower groups of such indices that share all weight matrices, or a mapping
            that names what is shared: ``{"attention": groups, "mlp": groups}`` or ``{"all":
            groups}``, see `nn.share_weights`. The groups of one part are disjoint ("all" counts for
            both parts); those of attention and MLP may differ.
        mlp_ratio: for both towers, or by tower; as in the old block when None.
        gamma: initial gamma, for both towers or by tower. At 1 a new tower does not mix tokens, so
            that a text's feature depends only on its length until training changes W_q or gamma.
            The two text blocks of siclip-tiny learned faster from 0.3; in a deep tower the means
            would add up and outweigh the tokens.
        mask_padding: let no token see the padding behind its text, so that `crop_texts` can leave
            it out. The text tower must be open_clip's separate one (custom_text), and pool the end
            of the text; all its blocks must be replaced. A causal tower stays as it is: its tokens
            do not see padding.
        init: "random", or what a matrix starts from that blocks share: the old matrix of the
            "first" block in the tower, or the "average" of all, see `init_blocks`.

    Returns the same model, and a report. Raises ValueError (TypeError for another type), and leaves
    the model unchanged, if an argument is unknown, or a tower has no replaceable blocks (a ResNet,
    a Hugging Face encoder in open_clip, window or rotary attention, simplified blocks), a mask that
    is not causal (CoCa's text tower) or an activation that is not in `nn.ACTIVATIONS`, or padding
    cannot be masked, or `init_blocks` does not know a block.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    towers = checks.sequence("towers", towers, 'a sequence, e.g. ("text", "image")')
    if not towers:
        raise InputError("towers: expected at least one, got none")
    checks.check_boolean("mask_padding", mask_padding)
    checks.check_instance("blocks", blocks, Mapping | None, "a mapping of towers to indices")
    checks.check_instance("share", share, Mapping | None, "a mapping of towers to groups")
    blocks = dict(blocks or {})
    share = dict(share or {})
    _check_names("towers", towers, TOWERS)
    _check_names("blocks", blocks, towers)
    _check_names("share", share, towers)
    for name, value in (("mlp_ratio", mlp_ratio), ("gamma", gamma)):
        if isinstance(value, Mapping):
            # also of a tower that is not replaced now, which a recipe may name
            _check_names(name, value, TOWERS)
    if init not in ("random", *init_blocks.MERGES):
        raise InputError(f"init: expected random, average or first, got {init!r}")
    before = count_parameters(model)
    planned: list[tuple[Site, SimplifiedBlock]] = []
    text_blocks: list[Any] = []
    for tower in dict.fromkeys(towers):
        sites = _sites(model, tower)
        chosen = _chosen(blocks.get(tower), len(sites), tower)
        start = gamma.get(tower, 1.0) if isinstance(gamma, Mapping) else gamma
        ratio = mlp_ratio.get(tower) if isinstance(mlp_ratio, Mapping) else mlp_ratio
        new: list[Any] = [_build(sites[index], ratio, start) for index in chosen]
        planned += zip([sites[index] for index in chosen], new)
        if tower == "text":
            text_blocks = new
        for part, groups in _groups(share.get(tower, ()), chosen).items():
            share_weights(new, [list(map(chosen.index, group)) for group in groups], part)

    causal = bool(text_blocks) and all(block.causal for block in text_blocks)
    mask_padding = mask_padding and not causal
    if mask_padding:
        _check_maskable(model, len(text_blocks))
    if init != "random":
        starts = {site.path: (block, site.block.state_dict()) for site, block in planned}
        init_blocks.start(starts, init)
    for site, block in planned:
        model.set_submodule(site.path, block)
    if mask_padding:
        model.get_submodule("text").__class__ = MaskedTextTransformer
        for block in text_blocks:
            block.masks_padding = True
    replaced = {site.path: type(site.block).__name__ for site, _ in planned}
    return model, SimplifyReport(replaced, before, count_parameters(model))


def _check_names(argument: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises InputError, which names `argument`, for names that are not allowed."""
    unknown = sorted({*names} - {*allowed})
    if unknown:
        raise InputError(f"{argument}: expected names out of {list(allowed)}, got {unknown}")


def _chosen(indices: Sequence[int] | None, count: int, tower: str) -> list[int]:
    """Returns the sorted indices of the blocks to replace, for None all `count` of a tower."""
    every = [*range(count)]
    chosen = every if indices is None else sorted(checks.indices("blocks", indices))
    if not chosen or not {*chosen} <= {*every}:
        raise InputError(
            f"blocks: expected indices of the {count} blocks of the {tower} tower, got {chosen}"
        )
    return chosen


def _check_maskable(model: nn.Module, replaced: int) -> None:
    """Raises InputError if the text tower, with so many blocks replaced, cannot mask padding."""
    tower: Any = getattr(model, "text", None)
    pool = getattr(tower, "pool_type", None)
    known = type(tower) is TextTransformer and pool in ("argmax", "eos")
    if known and replaced == len(tower.transformer.resblocks):
        return
    raise InputError(
        "mask_padding: expected open_clip's own text tower (custom_text=True) that pools by argmax "
        "or eos, and all its blocks replaced, got "
        f"{type(tower or model).__name__} that pools by {pool} and {replaced} blocks"
    )


def _groups(share: Groups | Mapping[str, Groups], chosen: list[int]) -> dict[str, list[list[int]]]:
    """Returns a tower's groups of block indices by what they share: "attention", "mlp" or "all".

    share: groups (of "all"), or such a mapping. chosen: the indices of the replaced blocks.
    """
    parts: Mapping[str, Groups] = share if isinstance(share, Mapping) else {"all": share}
    _check_names("share", parts, SHARED_PARTS)
    shared = {part: checks.groups("share", groups) for part, groups in parts.items() if groups}
    for part in ("attention", "mlp"):
        groups = shared.get(part, []) + shared.get("all", [])
        indices = [index for group in groups for index in group]
        if len(set(indices)) < len(indices) or not {*indices} <= {*chosen}:
            raise InputError(
                f"share: expected disjoint groups of the replaced blocks, {chosen}, got {shared}"
            )
    return shared
