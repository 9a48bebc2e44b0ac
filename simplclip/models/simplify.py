"""Simplified blocks in open_clip and transformers models: `simplify` replaces transformer blocks of
one model in place.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from simplclip.nn import SHARED_PARTS, SimplifiedBlock, share_weights
from simplclip.ops import checks

TOWERS = ("text", "image")
Groups = Sequence[Sequence[int]]  # indices of blocks
_ACT_NAMES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quickgelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
# Names of activations in transformers.
_ACT_NAMES |= {
    "GELUActivation": "gelu",
    "QuickGELUActivation": "quickgelu",
    "SiLUActivation": "silu",
}
_ACT_NAMES |= dict.fromkeys(("NewGELUActivation", "FastGELUActivation"), "gelu_tanh")


def is_causal_mask(mask: Tensor) -> bool:  # [L, L]
    """Whether ``mask`` lets token i see exactly 0..i: additive 0 / -inf, or boolean with True for
    hidden.
    """
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(
        mask.float(), torch.zeros_like(mask, dtype=torch.float32).masked_fill(hidden, float("-inf"))
    )


class TransformerBlock(SimplifiedBlock):
    """A block of open_clip's ``Transformer``: [B, L, C].

    A causal block accepts only the tower's causal mask; other blocks accept no mask. The values of
    a mask are checked once, and again only after it has changed. A block that masks padding gets
    the lengths [B] of the texts as its mask.
    """

    def __init__(self, *shape: Any, masks_padding: bool = False, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.masks_padding = masks_padding
        # length -> place and version of the accepted mask, and the mask
        self._accepted: dict[int, tuple[tuple, Tensor]] = {}

    def get_weight_dtype(self) -> torch.dtype:
        return self.fc1.weight.dtype

    def forward(
        self,
        x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        if k_x is not None or v_x is not None:
            raise InputError(
                "k_x, v_x: expected None, since a simplified block has no cross-attention, got a "
                "tensor"
            )
        batch, length = x.shape[:2]
        shape = (batch,) if self.masks_padding else (length, length) if self.causal else None
        given = None if attn_mask is None else tuple(attn_mask.shape)
        if given != shape:
            what = (
                "lengths of texts"
                if self.masks_padding
                else "the causal mask"
                if self.causal
                else "no mask"
            )
            raise InputError(f"attn_mask: expected {what}, {shape}, got {given}")
        if (
            attn_mask is not None
            and self.causal
            and not self.masks_padding
            and not self._accepts(attn_mask)
        ):
            raise InputError(
                f"attn_mask: expected the causal mask, {shape}, got another mask of this shape"
            )
        return super().forward(x, attn_mask if self.masks_padding else None)

    def _accepts(self, mask: Tensor) -> bool:
        # While tracing and for fake tensors, which have no values, the check made by `simplify` has
        # to suffice.
        if (
            torch.compiler.is_compiling()
            or type(mask) is not Tensor
            or mask.is_meta
            or mask.is_inference()
        ):
            return True
        place = mask.data_ptr(), mask.shape, mask.stride(), mask._version
        if place != self._accepted.get(len(mask), ((), None))[0]:
            if not is_causal_mask(mask):
                return False
            # kept alive, so that no other tensor gets its address
            self._accepted[len(mask)] = place, mask
        return True


class TimmBlock(SimplifiedBlock):
    """A block of timm's ``VisionTransformer``: [B, L, C], full attention."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError(
                "attn_mask, is_causal: expected None and False, since this block attends to every "
                "token"
            )
        return super().forward(x)


class MapBlock(SimplifiedBlock):
    """A block on feature maps [B, C, H, W] (timm's FastViT): full attention over the H·W
    positions.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        batch, width, height, breadth = x.shape
        tokens = super().forward(x.permute(0, 2, 3, 1).reshape(batch, height * breadth, width))
        return tokens.reshape(batch, height, breadth, width).permute(0, 3, 1, 2)


class MaskedTextTransformer(TextTransformer):
    """open_clip's text tower with simplified blocks that see nothing behind the end of a text.

    In the place of a mask these blocks get the lengths of the texts, up to and including the token
    that the tower pools.
    """

    masks_padding = True

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        ends = text if self.pool_type == "argmax" else (text == self.eos_id).int()
        return super()._embeds(text)[0], ends.argmax(1) + 1


@dataclass
class SimplifyReport:
    """The result of `simplify`: the path and the former type of each replaced block, and the
    parameters before and after, see `count_parameters`.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = [
            f"{part}: {size:,} parameters, {self.before[part]:,} before"
            for part, size in self.after.items()
        ]
        return "\n".join(
            [f"{len(self.replaced)} blocks replaced: {', '.join(self.replaced)}", *sizes]
        )


@dataclass(frozen=True)
class _Site:
    """A block that can be replaced, and the class of its replacement with arguments that depend on
    the tower.
    """

    path: str
    block: nn.Module
    cls: type[SimplifiedBlock]
    options: dict = field(default_factory=dict)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the parameters of a model by part: image, text, other (scale, bias, decoder), total.

    Shared ones count once.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    every = {p for _, p in named}
    image = {p for name, p in named if name.startswith(("visual", "vision_model."))}
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
    """Replaces blocks of an open_clip or transformers model by simplified ones (SAS-P), in place.

    This works on the text transformer of CLIP and CustomTextCLIP, MobileCLIP-S0's, open_clip's
    VisionTransformer, the attention blocks of timm's VisionTransformer and FastViT, and the towers
    of transformers' CLIPModel, SiglipModel and Siglip2Model (from 5.0 on; docs/block.md says which
    masks and options work). New blocks have the old blocks' activation, eps of the norm, drop path,
    dtype, device and mode. A causal mask is recognised and kept. Gains replace layer scale.

    Args:
        towers: "text", "image" or both.
        blocks: for each tower the indices of the attention blocks to replace; by default all of a
            tower are replaced.
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

    Returns the same model, and a report of what was replaced with the parameter counts before and
    after. Raises ValueError (TypeError for another type), and leaves the model unchanged, if an
    argument is unknown, or a tower has no replaceable blocks (a ResNet, a Hugging Face encoder in
    open_clip, window or rotary attention) or a mask that is not causal (CoCa's text tower), or
    padding cannot be masked, or `init_blocks` does not know a block.
    """
    checks.instance("model", model, nn.Module, "an nn.Module")
    checks.instance("blocks", blocks, Mapping | None, "a mapping of towers to indices")
    checks.instance("share", share, Mapping | None, "a mapping of towers to groups of indices")
    blocks, share = dict(blocks or {}), dict(share or {})
    for name, keys, allowed in (
        ("towers", towers, TOWERS),
        ("blocks", blocks, towers),
        ("share", share, towers),
    ):
        if unknown := sorted({*keys} - {*allowed}):
            raise InputError(f"{name}: expected names out of {list(allowed)}, got {unknown}")
    if init not in (choices := ("random", *init_blocks.MERGES)):
        raise InputError(f"init: expected one of {choices}, got {init!r}")
    encoders = _encoders(model)
    report = SimplifyReport(before=count_parameters(model))
    planned: list[tuple[_Site, SimplifiedBlock]] = []
    text_blocks: list[Any] = []
    for tower in dict.fromkeys(towers):
        sites = block_sites(model, tower)
        ratio = mlp_ratio.get(tower) if isinstance(mlp_ratio, Mapping) else mlp_ratio
        start = gamma.get(tower, 1.0) if isinstance(gamma, Mapping) else gamma
        chosen = sorted(blocks.get(tower, range(len(sites))))
        if not chosen or not {*chosen} <= {*range(len(sites))}:
            raise InputError(
                f"blocks: expected indices of the {len(sites)} blocks of the {tower} tower, got "
                f"{chosen}"
            )
        new: list[Any] = [build_block(sites[index], ratio, gamma=start) for index in chosen]
        planned += zip([sites[index] for index in chosen], new)
        text_blocks += new if tower == "text" else ()
        if encoders:
            new[0].checks_mask = True
        for part, groups in groups_of(share.get(tower, ()), chosen).items():
            share_weights(new, [[chosen.index(i) for i in group] for group in groups], part)

    mask_padding = mask_padding and not (text_blocks and all(block.causal for block in text_blocks))
    text_tower: Any = getattr(model, "text", None)
    maskable = type(text_tower) in (
        TextTransformer,
        MaskedTextTransformer,
    ) and text_tower.pool_type in ("argmax", "eos")
    if mask_padding and not (
        maskable and len(text_blocks) == len(text_tower.transformer.resblocks)
    ):
        got = (
            f"{type(text_tower or model).__name__} that pools by "
            f"{getattr(text_tower, 'pool_type', None)}"
        )
        expected = (
            "open_clip's own text tower (custom_text=True) that pools by argmax or eos, and all "
            "its blocks replaced"
        )
        raise InputError(
            f"mask_padding: expected {expected}, got {got} and {len(text_blocks)} blocks"
        )
    if init != "random":
        init_blocks.start(
            {site.path: (block, site.block.state_dict()) for site, block in planned}, init
        )
    for site, block in planned:
        report.replaced[site.path] = type(site.block).__name__
        model.set_submodule(site.path, block)
    if mask_padding:
        text_tower.__class__ = MaskedTextTransformer
        for block in text_blocks:
            block.masks_padding = True
    if encoders:
        encoders.prepare_loading(model)
    report.after = count_parameters(model)
    return model, report


def groups_of(
    share: Groups | Mapping[str, Groups], chosen: list[int]
) -> dict[str, list[list[int]]]:
    """Returns a tower's groups by the part that they share.

    Raises InputError if they are not disjoint groups of `chosen`.
    """
    parts: Mapping[str, Groups] = share if isinstance(share, Mapping) else {"all": share}
    if unknown := sorted({*parts} - {*SHARED_PARTS}):
        raise InputError(f"share: expected parts out of {SHARED_PARTS}, got {unknown}")
    shared = {part: [list(group) for group in groups] for part, groups in parts.items() if groups}
    for part in ("attention", "mlp"):
        indices = [
            index for name in (part, "all") for group in shared.get(name, ()) for index in group
        ]
        if len(set(indices)) < len(indices) or not {*indices} <= {*chosen}:
            raise InputError(
                f"share: expected disjoint groups of the replaced blocks, {chosen}, got {shared}"
            )
    return shared


def block_sites(model: nn.Module, tower: str) -> list[_Site]:
    """The blocks of a tower that `simplify` can replace, in the order of their indices."""
    if encoders := _encoders(model):
        return [_Site(*layer) for layer in encoders.encoder_layers(model, tower)]
    return list(_text_sites(model) if tower == "text" else _image_sites(model))


def _encoders(model: nn.Module) -> Any:
    """Returns our module for transformers' models if `model` is such a model, else None."""
    # imported already if `model` is of transformers
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    from simplclip.models import hugging_face

    return hugging_face


def _text_sites(model: nn.Module) -> Iterable[_Site]:
    tower: Any = getattr(model, "text", None)
    prefix, tower = ("", model) if tower is None else ("text.", tower)
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
    mask: Any = tower.attn_mask
    if mask is not None and not mask.is_meta and not is_causal_mask(mask):
        raise InputError(
            "text: expected no mask or a causal one, got a tower with another attn_mask"
        )
    options = {"causal": mask is not None, "masks_padding": getattr(tower, "masks_padding", False)}
    return _transformer_sites(transformer, f"{prefix}transformer", "text", **options)


def _image_sites(model: nn.Module) -> Iterable[_Site]:
    visual: Any = getattr(model, "visual", None)
    transformer = getattr(visual, "transformer", None)
    if isinstance(transformer, Transformer):
        return _transformer_sites(transformer, "visual.transformer", "image")
    # Subclasses may change the signature or the attention, so only the exact classes are known to
    # fit. A simplified block of an earlier call keeps its index and can be replaced again.
    classes: dict[type, type[SimplifiedBlock]] = {Block: TimmBlock, AttentionBlock: MapBlock}
    modules = dict(visual.named_modules(prefix="visual")) if visual is not None else {}
    classes |= {
        type(module): type(module)
        for module in modules.values()
        if isinstance(module, SimplifiedBlock)
    }
    sites = [
        _Site(path, module, classes[type(module)])
        for path, module in modules.items()
        if type(module) in classes
    ]
    if not sites:
        expected = "blocks of open_clip's VisionTransformer, timm's VisionTransformer or FastViT"
        raise InputError(
            f"image: expected {expected}, got {type(getattr(visual, 'trunk', visual)).__name__} "
            "without any"
        )
    return sites


def _transformer_sites(
    transformer: Transformer, path: str, tower: str, **options: bool
) -> Iterator[_Site]:
    for index, block in enumerate(transformer.resblocks):
        if not isinstance(
            block, ResidualAttentionBlock | CustomResidualAttentionBlock | SimplifiedBlock
        ):
            raise InputError(
                f"{tower}: expected residual attention blocks, got {type(block).__name__}"
            )
        yield _Site(f"{path}.resblocks.{index}", block, TransformerBlock, options)


def attention_of(block: Any) -> Any:
    """Returns the attention of a block that is not simplified."""
    return next(
        getattr(block, name)
        for name in ("attn", "self_attn", "token_mixer")
        if hasattr(block, name)
    )


def build_block(site: _Site, mlp_ratio: float | None = None, **options: Any) -> SimplifiedBlock:
    """Builds the block that replaces the block of a site. options: of `SimplifiedBlock`."""
    block: Any = site.block
    if isinstance(block, SimplifiedBlock):
        weight, heads = block.fc1.weight, block.heads
        options |= {"act": block.act, "drop_path": block.drop_path, "norm": block.norm_name}
    else:
        heads = attention_of(block).num_heads
        # FastViT's MLP begins with a depthwise convolution, which has one input channel.
        dense = (
            m
            for m in block.mlp.modules()
            if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[1] > 1
        )
        weight = next(dense).weight
        acts = (_ACT_NAMES.get(type(m).__name__) for m in block.mlp.modules())
        options["act"] = next((name for name in acts if name), "gelu")
        options["drop_path"] = next(
            (m.drop_prob for m in block.modules() if isinstance(m, DropPath)), 0.0
        )
    hidden, width = weight.shape[:2]
    new = site.cls(
        width, heads, hidden / width if mlp_ratio is None else mlp_ratio, **options, **site.options
    )
    new.norm.eps = next(
        (m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)), new.norm.eps
    )
    return new.to(device=weight.device, dtype=weight.dtype).train(block.training)
