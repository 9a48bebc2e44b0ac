"""Simplified blocks in models of open_clip: `simplify` replaces blocks in place.

The blocks here have the signatures of open_clip's and timm's, in whose places they stand.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
)
from timm.layers import DropPath
from timm.models.fastvit import AttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.naming import tower_of
from simplclip.nn import ACTIVATIONS, SimplifiedBlock, share_weights
from simplclip.ops import checks
from simplclip.ops.modes import has_values

TOWERS = ("text", "image")
Groups = Sequence[Sequence[int]]  # indices of blocks


def text_tower(model: nn.Module) -> Any:
    """Returns the text tower of an open_clip model; open_clip's CLIP is its own."""
    return getattr(model, "text", model)


def is_causal_mask(mask: Tensor) -> bool:
    """Whether an additive mask [L, L], of 0 and -inf, lets token i see exactly the tokens 0..i.

    On fake tensors, which have no values, every mask is taken to be causal.
    """
    return not has_values(mask) or torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


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

        k_x, v_x: not used. attn_mask: the tower's causal mask [L, L], whose values `simplify`
        checked, for a causal block; the lengths [B] of the texts for one that masks padding; else
        None.
        """
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


# Subclasses may change the signature or the attention, so only the exact classes are known to fit.
REPLACEMENTS: dict[type, type[SimplifiedBlock]] = {
    ResidualAttentionBlock: TransformerBlock,
    CustomResidualAttentionBlock: TransformerBlock,
    Block: TimmBlock,
    AttentionBlock: MapBlock,
}


def _replaceable(model: nn.Module, tower: str) -> dict[str, Any]:
    """Returns the blocks of a tower that `simplify` replaces, by path; InputError without any."""
    blocks = {
        path: module
        for path, module in model.named_modules()
        if type(module) in REPLACEMENTS and tower_of(path) == tower
    }
    if not blocks:
        part = text_tower(model) if tower == "text" else getattr(model, "visual", nn.Identity())
        got = type(getattr(part, "trunk", getattr(part, "transformer", part))).__name__
        raise InputError(
            f"{tower}: expected a tower with blocks of open_clip's transformers, timm's "
            f"VisionTransformer or FastViT, got {got} without any"
        )
    return blocks


def _is_causal(model: nn.Module) -> bool:
    """Whether the text tower is causal; InputError for a mask of another kind."""
    tower = text_tower(model)
    mask = getattr(tower, "attn_mask", None)
    other_mask = mask is not None and not is_causal_mask(mask)
    has_class_token = getattr(tower, "cls_emb", None) is not None
    if other_mask or has_class_token or getattr(tower, "use_pad_mask", False):
        raise InputError(
            "text: expected no mask or a causal one, got a tower with another mask or a class token"
        )
    return mask is not None


def _build(
    path: str, block: Any, causal: bool, mlp_ratio: float | None, gamma: float
) -> SimplifiedBlock:
    """Returns a new block with random weights for the place of an old one, at `path`."""
    layers = (m for m in block.mlp.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    # FastViT's MLP begins with a depthwise layer
    weight = next(layer.weight for layer in layers if layer.weight.shape[1] > 1)
    hidden, width = weight.shape[:2]
    if mlp_ratio is None:
        mlp_ratio = hidden / width
    attention = block.token_mixer if isinstance(block, AttentionBlock) else block.attn
    drops = (m.drop_prob for m in block.modules() if isinstance(m, DropPath))
    new = REPLACEMENTS[type(block)](
        width,
        attention.num_heads,
        mlp_ratio,
        causal=causal,
        act=_act_of(block.mlp, path),
        gamma=gamma,
        drop_path=next(drops, 0.0),
    )
    eps = (m.eps for m in block.modules() if isinstance(m, nn.LayerNorm))
    new.norm.eps = next(eps, new.norm.eps)
    made = new.fc1.weight
    if made.device != weight.device or made.dtype != weight.dtype:  # torch cannot cast fake modules
        new.to(device=weight.device, dtype=weight.dtype)
    return new.train(block.training)


def _act_of(mlp: Any, path: str) -> str:
    """Returns an activation's name in `nn.ACTIVATIONS`; InputError for another one."""
    act = mlp.gelu if hasattr(mlp, "gelu") else mlp.act  # of open_clip and of timm
    name = type(act).__name__.lower()
    if name == "gelutanh" or getattr(act, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    if name not in ACTIVATIONS:
        raise InputError(
            f"{tower_of(path)}: expected blocks with an activation out of {tuple(ACTIVATIONS)}, "
            f"got {type(act).__name__} in {path}; towers or blocks of `simplify` can leave it out"
        )
    return name


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
    """Returns the parameters of "image", "text", "other" (scale and bias), and in "total"."""
    sizes = dict.fromkeys(("image", "text", "other"), 0)
    for name, parameter in model.named_parameters():
        sizes[tower_of(name) or "other"] += parameter.numel()
    return sizes | {"total": sum(sizes.values())}


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

    This works on the blocks of open_clip's transformers and on the attention blocks of timm's
    VisionTransformer and FastViT. New blocks have the old blocks' activation, eps of the norm, drop
    path, dtype, device and mode. A causal mask is kept. Gains replace layer scale.

    Args:
        towers: "text", "image" or both.
        blocks: for each tower the indices of the blocks to replace, by default all, among its
            attention blocks that are not simplified.
        share: for each tower groups of such indices that share all weight matrices, or a mapping
            that names what is shared: ``{"attention": groups, "mlp": groups}`` or ``{"all":
            groups}``, see `nn.share_weights`.
        mlp_ratio: for both towers, or by tower; as in the old block when None.
        gamma: initial gamma, for both towers or by tower. At 1 a new tower does not mix tokens
            until training changes W_q or gamma. The two text blocks of siclip-tiny learned faster
            from 0.3; in a deep tower the means would add up and outweigh the tokens.
        mask_padding: let no token see the padding behind its text, so that `crop_texts` can leave
            it out. The text tower must be open_clip's separate one (custom_text), and pool the end
            of the text; all its blocks must be replaced. In a causal tower nothing changes.
        init: "random", or what a matrix starts from that blocks share: the old matrix of the
            "first" block in the tower, or the "average" of all, see `init_blocks`.

    Returns the same model, and a report. Raises ValueError (TypeError for another type), and leaves
    the model unchanged, if an argument is unknown, a tower has no replaceable blocks (a ResNet, a
    Hugging Face encoder, window or rotary attention), a mask that is not causal (CoCa's text tower)
    or an activation that is not in `nn.ACTIVATIONS`, or padding cannot be masked.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    towers = checks.sequence("towers", towers, 'a sequence, e.g. ("text", "image")')
    blocks, share = blocks or {}, share or {}
    checks.check_instance("blocks", blocks, Mapping, "a mapping of towers to indices")
    checks.check_instance("share", share, Mapping, "a mapping of towers to groups")
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
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for tower in dict.fromkeys(towers):
        causal = tower == "text" and _is_causal(model)
        found = _replaceable(model, tower)
        every = [*range(len(found))]
        chosen = sorted(checks.indices("blocks", blocks.get(tower, every)))
        if not chosen or not {*chosen} <= {*every}:
            expected = f"indices of the {len(found)} blocks of the {tower} tower"
            raise InputError(f"blocks: expected {expected}, got {chosen}")
        start = gamma.get(tower, 1.0) if isinstance(gamma, Mapping) else gamma
        ratio = mlp_ratio.get(tower) if isinstance(mlp_ratio, Mapping) else mlp_ratio
        replaced = {path: found[path] for index, path in enumerate(found) if index in chosen}
        made = [_build(path, block, causal, ratio, start) for path, block in replaced.items()]
        shared = share.get(tower, ())
        parts = shared if isinstance(shared, Mapping) else {"all": shared}
        for part, given in parts.items():
            groups = checks.groups("share", given)
            if not {*chain(*groups)} <= {*chosen}:
                expected = f"groups of the replaced blocks, {chosen}"
                raise InputError(f"share: expected {expected}, got {groups}")
            share_weights(made, [list(map(chosen.index, group)) for group in groups], part)
        old |= replaced
        new |= dict(zip(replaced, made))
    if init != "random":
        init_blocks.start({path: (new[path], old[path].state_dict()) for path in old}, init)
    text_blocks = [block for path, block in new.items() if tower_of(path) == "text"]
    # causal tokens do not see padding
    if mask_padding and not any(block.causal for block in text_blocks):
        _check_maskable(model, len(text_blocks))
        model.get_submodule("text").__class__ = MaskedTextTransformer
        for block in text_blocks:
            block.masks_padding = True
    for path, block in new.items():
        model.set_submodule(path, block)
    kinds = {path: type(block).__name__ for path, block in old.items()}
    return model, SimplifyReport(kinds, before, count_parameters(model))


def _check_names(argument: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises InputError, which names `argument`, for names that are not allowed."""
    unknown = sorted({*names} - {*allowed})
    if unknown:
        raise InputError(f"{argument}: expected names out of {list(allowed)}, got {unknown}")


def _check_maskable(model: nn.Module, replaced: int) -> None:
    """Raises InputError if the text tower, with so many blocks replaced, cannot mask padding."""
    tower: Any = getattr(model, "text", None)
    pool = getattr(tower, "pool_type", None)
    whole = type(tower) is TextTransformer and replaced == len(tower.transformer.resblocks)
    if not whole or pool not in ("argmax", "eos"):
        raise InputError(
            "mask_padding: expected open_clip's own text tower (custom_text=True) that pools by "
            "argmax or eos, and all its blocks replaced, got "
            f"{type(tower or model).__name__} that pools by {pool} and {replaced} blocks"
        )
