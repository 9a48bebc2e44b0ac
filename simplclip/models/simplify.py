"""Simplified blocks in open_clip and transformers models: `simplify` replaces blocks in place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_clip.transformer import TextTransformer
from torch import nn

from simplclip.common.errors import InputError
from simplclip.models import init_blocks
from simplclip.models.blocks import MaskedTextTransformer
from simplclip.models.sites import Site, block_sites, build_block, module_for_transformers
from simplclip.nn import SHARED_PARTS, SimplifiedBlock, share_weights
from simplclip.ops import checks

TOWERS = ("text", "image")
Groups = Sequence[Sequence[int]]  # indices of blocks


@dataclass
class SimplifyReport:
    """The result of `simplify`.

    replaced: the path of each replaced block -> its former type.
    before, after: the parameters, see `count_parameters`.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

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
    open_clip, window or rotary attention), a mask that is not causal (CoCa's text tower) or an
    activation that is not in `nn.ACTIVATIONS`, or padding cannot be masked, or `init_blocks` does
    not know a block.
    """
    checks.check_instance("model", model, nn.Module, "an nn.Module")
    towers = checks.sequence("towers", towers, 'a sequence, e.g. ("text", "image")')
    if not towers:
        raise InputError("towers: expected at least one, got none")
    checks.check_boolean("mask_padding", mask_padding)
    checks.check_instance("blocks", blocks, Mapping | None, "a mapping of towers to indices")
    checks.check_instance(
        "share", share, Mapping | None, "a mapping of towers to groups of indices"
    )
    blocks = dict(blocks or {})
    share = dict(share or {})
    _check_names("towers", towers, TOWERS)
    _check_names("blocks", blocks, towers)
    _check_names("share", share, towers)
    for name, value in (("mlp_ratio", mlp_ratio), ("gamma", gamma)):
        if isinstance(value, Mapping):
            # also of a tower that is not replaced now, which a recipe may name
            _check_names(name, value, TOWERS)
    choices = ("random", *init_blocks.MERGES)
    if init not in choices:
        raise InputError(f"init: expected one of {choices}, got {init!r}")
    encoders = module_for_transformers(model)
    report = SimplifyReport(before=count_parameters(model))
    planned: list[tuple[Site, SimplifiedBlock]] = []
    text_blocks: list[Any] = []
    for tower in dict.fromkeys(towers):
        sites = block_sites(model, tower)
        chosen = _chosen(blocks.get(tower), len(sites), tower)
        start = gamma.get(tower, 1.0) if isinstance(gamma, Mapping) else gamma
        ratio = mlp_ratio.get(tower) if isinstance(mlp_ratio, Mapping) else mlp_ratio
        new: list[Any] = [build_block(sites[index], ratio, start) for index in chosen]
        planned += zip([sites[index] for index in chosen], new)
        if tower == "text":
            text_blocks = new
        if encoders is not None:
            new[0].checks_mask = True
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
        report.replaced[site.path] = type(site.block).__name__
        model.set_submodule(site.path, block)
    if mask_padding:
        model.get_submodule("text").__class__ = MaskedTextTransformer
        for block in text_blocks:
            block.masks_padding = True
    if encoders is not None:
        encoders.prepare_loading(model)
    report.after = count_parameters(model)
    return model, report


def _check_names(argument: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises InputError, which names `argument`, for names that are not allowed."""
    unknown = sorted({*names} - {*allowed})
    if unknown:
        raise InputError(f"{argument}: expected names out of {list(allowed)}, got {unknown}")


def _chosen(indices: Sequence[int] | None, count: int, tower: str) -> list[int]:
    """Returns the sorted indices of the blocks to replace, for None all `count` of a tower."""
    if indices is not None:
        indices = checks.indices("blocks", indices)
    chosen = sorted(range(count) if indices is None else indices)
    if not chosen or not {*chosen} <= {*range(count)}:
        raise InputError(
            f"blocks: expected indices of the {count} blocks of the {tower} tower, got {chosen}"
        )
    return chosen


def _check_maskable(model: nn.Module, replaced: int) -> None:
    """Raises InputError if the text tower, with so many blocks replaced, cannot mask padding."""
    tower: Any = getattr(model, "text", None)
    pool = getattr(tower, "pool_type", None)
    known = type(tower) in (TextTransformer, MaskedTextTransformer)
    if known and pool in ("argmax", "eos") and replaced == len(tower.transformer.resblocks):
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
    unknown = sorted({*parts} - {*SHARED_PARTS})
    if unknown:
        raise InputError(f"share: expected parts out of {SHARED_PARTS}, got {unknown}")
    shared = {part: checks.groups("share", groups) for part, groups in parts.items() if groups}
    for part in ("attention", "mlp"):
        groups = shared.get(part, []) + shared.get("all", [])
        indices = [index for group in groups for index in group]
        if len(set(indices)) < len(indices) or not {*indices} <= {*chosen}:
            raise InputError(
                f"share: expected disjoint groups of the replaced blocks, {chosen}, got {shared}"
            )
    return shared
