"""Cropping of texts: `crop_texts` lets a model leave out the tokens behind their ends."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from simplclip.common.errors import InputError, check_count
from simplclip.models.simplify import is_causal_mask, text_tower
from simplclip.ops import checks
from simplclip.ops.modes import has_values

GROUP_TOKENS = 512  # cost of one more call of the tower, in tokens: launches, and small products


def crop_texts(model: nn.Module, *, multiple: int = 8, groups: int = 4) -> TextCrop:
    """Lets an open_clip model encode texts without the tokens behind their ends, in place.

    Tokenizers pad every text to the context length, 77 tokens. In causal towers, or where padding
    is masked, padding changes no feature. `encode_text`, and with it `forward`, then sorts a batch
    by length, cuts the batch into groups and computes each group at the length of its longest text.
    Features and gradients are those of the padded batch up to rounding, in the same order.

    Args:
        model: an open_clip model whose text tower is causal, or masks padding (Hugging Face's
            towers do).
        multiple: lengths are rounded up to a multiple of it, for kernels, and for torch.compile,
            which compiles each length.
        groups: the most groups of a batch; fewer are made if more would not be faster. 1 keeps the
            batch in one piece: use 1 with torch.compile, which would compile every size of a group.

    The host reads the texts: it waits for texts on a GPU, while texts on the CPU are cropped there,
    then moved. While torch exports a model or runs it on fake tensors, texts stay as they are.

    Returns a `TextCrop`, whose `undo()` restores the model. Raises InputError, with the reason, if
    texts cannot be cropped.
    """
    check_count("multiple", multiple, 1)
    check_count("groups", groups, 1)
    if reason := _why_not(model):
        expected = "an open_clip model whose texts can be cropped"
        raise InputError(f"model: expected {expected}, got {reason}")
    return TextCrop(model, multiple, groups)


class TextCrop:
    """A replacement of a model's `encode_text` that crops texts; a copy has one of its own."""

    def __init__(self, model: nn.Module, multiple: int, groups: int) -> None:
        """Replaces the model's `encode_text`, until `undo`; see `crop_texts`, which checks."""
        # Since open_clip 4 forward() and encode_text() call _encode_text().
        self.name = "_encode_text" if hasattr(type(model), "_encode_text") else "encode_text"
        self.model = model
        self.multiple = multiple
        self.groups = groups
        vars(model)[self.name] = self

    def undo(self) -> None:
        """Restores the model's own `encode_text`; a second call does nothing."""
        vars(self.model).pop(self.name, None)

    def __call__(self, text: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns features [N, D] of token ids [N, L], in the same order, as `encode_text` does."""
        checks.check_instance("text", text, Tensor, "token ids [N, L], made by a tokenizer")
        if torch.compiler.is_exporting():
            return self.encode(text, args, options)
        return self._cropped(text, args, options)

    @torch.compiler.disable(recursive=False)
    def _cropped(self, text: Tensor, args: tuple, options: dict[str, Any]) -> Tensor:
        """Returns features [N, D] of texts [N, L], cropped and grouped by length."""
        device = next(text_tower(self.model).parameters()).device
        # fake and traced texts have no values
        if not has_values(text) or torch.jit.is_tracing() or text.ndim != 2 or not len(text):
            return self.encode(text.to(device), args, options)
        lengths = self.rounded(text)
        cuts = _cuts(lengths, self.groups)
        if len(cuts) == 1:
            cropped = text[:, : int(lengths.max())]
            return self.encode(cropped.to(device, non_blocking=True), args, options)
        order = lengths.argsort(stable=True)
        features = []
        for start, stop in itertools.pairwise((0, *cuts)):
            rows = order[start:stop]
            length = int(lengths[rows[-1]])
            group = text[rows.to(text.device), :length]
            features.append(self.encode(group.to(device, non_blocking=True), args, options))
        positions = order.argsort().to(device, non_blocking=True)
        return torch.cat(features).index_select(0, positions)

    def split(self, text: Tensor, tokens: int) -> list[Tensor]:
        """Returns the rows of texts [N, L] in each micro-batch, int64 on the CPU.

        The longest texts come first. A micro-batch has at most `tokens` tokens with padding, but at
        least one text.
        """
        lengths = self.rounded(text)
        order = lengths.argsort(descending=True, stable=True)
        rows = []
        start = 0
        while start < len(order):
            count = max(1, tokens // int(lengths[order[start]]))
            rows.append(order[start : start + count])
            start += count
        return rows

    def rounded(self, text: Tensor) -> Tensor:
        """Returns the lengths at which texts [N, L] are computed, int64 [N] on the CPU.

        They include the first padding token. Padding is the run at the end of the token that the
        tower masks; in causal towers, of any equal tokens.
        """
        tower = text_tower(self.model)
        if isinstance(tower, HFTextEncoder):
            pad = tower.config.pad_token_id
        elif getattr(tower, "use_pad_mask", False):
            pad = tower.pad_id
        else:
            pad = text[:, -1:]
        padding = (text == pad).flip(1).cumprod(1).sum(1).cpu()
        lengths = text.shape[1] + 1 - padding
        rounded = (lengths + self.multiple - 1) // self.multiple * self.multiple
        return rounded.clamp(max=text.shape[1])

    def encode(self, text: Tensor, args: tuple, options: dict[str, Any]) -> Tensor:
        """Returns the result of the model's own function; not for several threads at once."""
        encode = getattr(type(self.model), self.name)
        tower = text_tower(self.model)
        position = tower._parameters.get("positional_embedding")
        mask = tower._buffers.get("attn_mask")
        length = text.shape[1]
        # Hugging Face's towers choose positions themselves
        if position is None or len(position) == length:
            return encode(self.model, text, *args, **options)
        cropped = {"positional_embedding": position[:length]}
        if mask is not None:
            cropped["attn_mask"] = mask[:length, :length]
        vars(tower).update(cropped)
        try:
            return encode(self.model, text, *args, **options)
        finally:
            for name in cropped:
                del vars(tower)[name]


def _why_not(model: Any) -> str:
    """Returns why a model's texts cannot be cropped, the end of an error, or an empty string."""
    if not hasattr(model, "encode_text"):
        return f"{type(model).__name__}, which has no encode_text"
    if hasattr(model, "_orig_mod"):
        return "one that torch.compile made: crop the texts of the model, then compile it"
    if hasattr(model, "text_decoder"):
        return f"{type(model).__name__}, whose decoder reads the features of all tokens"
    if any(isinstance(vars(model).get(name), TextCrop) for name in ("encode_text", "_encode_text")):
        return "one whose texts are cropped already"
    tower = text_tower(model)
    if isinstance(tower, HFTextEncoder):  # it always masks padding
        return ""
    if getattr(tower, "cls_emb", None) is not None:
        return "a text tower with a class token, whose position depends on the length"
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", "argmax"))
    if pool not in ("argmax", "eos", "first"):
        return f"a text tower that pools by {pool!r}, not at the start or the end of a text"
    mask: Any = getattr(tower, "attn_mask", None)
    causal = mask is not None and is_causal_mask(mask)
    if causal or any(getattr(tower, name, False) for name in ("masks_padding", "use_pad_mask")):
        return ""
    return (
        "a text tower in which every token sees every token (simplify's mask_padding masks padding)"
    )


def _cuts(lengths: Tensor, groups: int) -> list[int]:
    """Returns where texts sorted by length are cut: each cut saves more than a call costs."""
    values, counts = lengths.unique(return_counts=True)
    # the end of the texts of each length -> the length
    length_at = dict(zip(itertools.accumulate(counts.tolist()), values.tolist()))

    def cost(cuts: list[int]) -> int:
        """Returns the cost, in tokens, of groups that end at these cuts."""
        groups = itertools.pairwise((0, *cuts))
        return sum((stop - start) * length_at[stop] + GROUP_TOKENS for start, stop in groups)

    cuts = [len(lengths)]
    while len(cuts) < groups:
        better = min((sorted({*cuts, stop}) for stop in length_at), key=cost)
        if cost(better) >= cost(cuts):
            break
        cuts = better
    return cuts
