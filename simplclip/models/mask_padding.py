"""Text towers of simplified blocks that are not causal and see no padding: `simplify` with mask_padding makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.transformer import TextTransformer
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.models.mobileclip import TextTower


class MaskedTextTransformer(TextTransformer):
    """open_clip's text tower with simplified blocks that see nothing behind the end of a text. In the place of a mask these
    blocks get the lengths of the texts, up to and including the token that the tower pools."""

    masks_padding = True

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        ends = text if self.pool_type == "argmax" else (text == self.eos_id).int()
        return super()._embeds(text)[0], ends.argmax(1) + 1


class MaskedTextTower(TextTower, MaskedTextTransformer):
    """MobileCLIP-S0's text tower with such blocks. Its convolutions read the padding next to a text."""


_MASKED = {TextTransformer: MaskedTextTransformer, TextTower: MaskedTextTower}


def tower_to_mask(model: Any, replaced: Sequence[Any]) -> Any:
    """Returns the text tower whose padding is to be masked; None if it is causal. Raises InputError if masking is impossible.

    replaced: the tower's blocks that `simplify` replaces, as in the report.
    """
    tower = getattr(model, "text", None)
    if not replaced:
        raise InputError("mask_padding: expected the text tower among the towers, got the image tower alone")
    if all(block.causal for block in replaced):
        return None
    if type(tower) not in (*_MASKED, *_MASKED.values()):
        kind = type(tower or model).__name__
        raise InputError(f"mask_padding: expected an open_clip text tower of its own (custom_text=True), got {kind}")
    if (pool := tower.pool_type) not in ("argmax", "eos"):
        raise InputError(f"mask_padding: expected a tower that pools the end of each text (argmax, eos), got {pool}")
    if len(replaced) < (count := len(tower.transformer.resblocks)):
        raise InputError(f"mask_padding: expected all {count} text blocks to be replaced, got {len(replaced)} of them")
    return tower


def mask_padding_of(tower: Any) -> None:
    """Makes a text tower pass the lengths of its texts to its simplified blocks."""
    tower.__class__ = _MASKED.get(type(tower), type(tower))
    for block in tower.transformer.resblocks:
        block.masks_padding = True
