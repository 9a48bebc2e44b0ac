"""Simplified blocks in the places of open_clip's and timm's, with their signatures."""

from functools import cached_property

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock
from simplclip.ops.modes import has_values


def is_causal_mask(mask: Tensor) -> bool:  # [L, L]
    """Whether ``mask`` lets token i see exactly the tokens 0..i.

    It is additive, 0 or -inf, or boolean with True for hidden tokens.
    """
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    additive = torch.zeros_like(mask, dtype=torch.float32).masked_fill(hidden, float("-inf"))
    return torch.equal(mask.float(), additive)


class TransformerBlock(SimplifiedBlock):
    """A block of open_clip's ``Transformer``: [B, L, C].

    A causal block accepts only the tower's causal mask; other blocks accept no mask. The values of
    a mask are checked once, and again only after it has changed. A block that masks padding gets
    the lengths [B] of the texts as its mask.
    """

    masks_padding = False

    @cached_property
    def _accepted(self) -> dict[int, tuple[tuple, Tensor]]:
        """The masks found causal, kept alive: L -> (address, shape, strides and version, mask)."""
        return {}

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

        k_x, v_x: None. attn_mask: the causal mask [L, L] of a causal block (see `is_causal_mask`),
        the lengths [B] of one with masks_padding, else None.
        """
        if k_x is not None or v_x is not None:
            raise InputError(
                "k_x, v_x: expected None, since a simplified block has no cross-attention, got a "
                "tensor"
            )
        self._check_mask(x, attn_mask)
        return super().forward(x, attn_mask if self.masks_padding else None)

    def _check_mask(self, x: Tensor, mask: Tensor | None) -> None:
        """Raises InputError unless the mask is the one that `forward` describes for x [B, L, C]."""
        batch, length = x.shape[:2]
        kind = "no mask"
        shape: tuple | None = None
        if self.masks_padding:
            kind = "lengths of texts"
            shape = (batch,)
        elif self.causal:
            kind = "the causal mask"
            shape = (length, length)
        got = None if mask is None else tuple(mask.shape)
        if got != shape:
            raise InputError(f"attn_mask: expected {kind}, {shape}, got {got}")
        if mask is not None and not self.masks_padding and not self._check_causal_and_cache(mask):
            raise InputError(f"attn_mask: expected {kind}, {shape}, got another mask of this shape")

    def _check_causal_and_cache(self, mask: Tensor) -> bool:
        """Whether a mask [L, L] is causal, or is a tensor without values, seen by `simplify`."""
        # Traced and fake tensors have no values, and inference tensors no version.
        if torch.compiler.is_compiling() or not has_values(mask) or mask.is_inference():
            return True
        key = mask.data_ptr(), mask.shape, mask.stride(), mask._version
        accepted, _ = self._accepted.get(len(mask), ((), None))
        if key == accepted:
            return True
        if not is_causal_mask(mask):
            return False
        # kept alive, so that no other tensor gets its address
        self._accepted[len(mask)] = key, mask
        return True


class TimmBlock(SimplifiedBlock):
    """A block of timm's ``VisionTransformer``: [B, L, C], full attention."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Returns [B, L, C]; refuses a mask and is_causal, which other blocks of timm take."""
        if attn_mask is not None or is_causal:
            raise InputError(
                "attn_mask, is_causal: expected None and False, since this block attends to every "
                "token"
            )
        return super().forward(x)


class MapBlock(SimplifiedBlock):
    """A block on timm's feature maps [B, C, H, W] (FastViT): full attention over H·W positions."""

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
        """Returns the tokens' embeddings [B, L, C], and the lengths [B] in the place of a mask."""
        ends = text if self.pool_type == "argmax" else (text == self.eos_id).int()
        return super()._embeds(text)[0], ends.argmax(1) + 1
