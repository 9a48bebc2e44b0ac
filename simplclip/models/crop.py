"""Cropping of texts: `crop_texts` lets an open_clip model compute no tokens behind the end of its texts."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock

__all__ = ["TextCrop", "crop_texts", "lengths_of", "try_crop"]

GROUP_TOKENS = 512  # cost of one more call of the tower, in tokens: launches, and small products


def crop_texts(model: nn.Module, *, multiple: int = 8, groups: int = 4) -> TextCrop:
    """Lets an open_clip model encode texts without the tokens behind their ends, in place.

    Tokenizers pad every text to the context length, 77 tokens. In causal towers, or where padding is masked, padding changes
    no feature. `encode_text`, and with it `forward`, then sorts a batch by length, cuts the batch into groups and computes
    each group at the length of its longest text. Features and gradients are those of the padded batch up to rounding, in the
    same order. Where convolutions reach a few tokens of padding, as in MobileCLIP-S0's masked text tower, these tokens are
    computed too.

    Args:
        model: an open_clip model. A trial finds on which tokens a text's feature depends, and so if texts can be cropped.
        multiple: lengths are rounded up to a multiple of it, for kernels, and for torch.compile, which compiles each length.
        groups: the most groups of a batch; fewer are made if more would not be faster. 1 keeps the batch in one piece: use 1
            with torch.compile, which would compile every size of a group.

    The host reads the texts: it waits for texts on a GPU, while texts on the CPU are cropped there, then moved.
    While torch exports a model or runs it on fake tensors, texts stay as they are.

    Returns a `TextCrop`, whose `undo()` restores the model. Raises InputError, with the reason, if texts cannot be cropped.
    Memory: activations of the tokens that are computed.
    """
    for name, value in (("multiple", multiple), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
    found = try_crop(model, multiple, groups)
    if isinstance(found, str):
        raise InputError(f"model: expected an open_clip model whose texts can be cropped, got {found}")
    return found


class TextCrop:
    """A replacement of a model's `encode_text` that crops texts. A copy of the model has a TextCrop of its own.

    reach: the number of padding tokens, after the first one, on which the feature of a text depends.
    """

    def __init__(self, model: nn.Module, multiple: int = 8, groups: int = 4, reach: int = 0) -> None:
        # Since open_clip 4 forward() and encode_text() call _encode_text().
        self.name = "_encode_text" if hasattr(type(model), "_encode_text") else "encode_text"
        self.model, self.multiple, self.groups, self.reach = model, multiple, groups, reach
        self.lock = threading.RLock()  # the tower has the positions and the mask of one length at a time
        vars(model)[self.name] = self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lock": None}  # locks cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def undo(self) -> None:
        """Restores the model's own `encode_text`."""
        vars(self.model).pop(self.name, None)

    @torch.compiler.disable(recursive=False)
    def __call__(self, text: Tensor, *args: Any, **options: Any) -> Any:
        device = _embedding(self.model).weight.device
        with self.lock:
            if type(text) is not Tensor or text.ndim != 2 or not len(text) or text.is_meta or torch.jit.is_tracing():
                return self._encode(text.to(device), *args, **options)
            lengths = self.rounded(text)
            if self.groups == 1 or len(text) == 1 or (cuts := _cuts(lengths, self.groups)) == [len(text)]:
                return self._encode(text[:, : int(lengths.max())].to(device, non_blocking=True), *args, **options)
            order = lengths.argsort(stable=True)
            parts, start = [], 0
            for stop in cuts:
                rows = order[start:stop]
                part = text[rows.to(text.device), : int(lengths[rows[-1]])].to(device, non_blocking=True)
                parts.append(self._encode(part, *args, **options))
                start = stop
            return torch.cat(parts).index_select(0, order.argsort().to(device, non_blocking=True))

    def split(self, text: Tensor, tokens: int) -> list[Tensor]:
        """Returns the rows of texts [N, L] in each micro-batch: at most `tokens` tokens with padding. Longest texts first."""
        lengths = self.rounded(text)
        order = lengths.argsort(descending=True, stable=True)
        rows, start = [], 0
        while start < len(order):
            count = max(1, tokens // int(lengths[order[start]]))
            rows.append(order[start : start + count])
            start += count
        return rows

    def rounded(self, text: Tensor) -> Tensor:
        """Returns the lengths at which texts [N, L] are computed, int64 [N] on the CPU."""
        lengths = lengths_of(text).cpu() + self.reach
        return ((lengths + self.multiple - 1) // self.multiple * self.multiple).clamp(max=text.shape[1])

    def _encode(self, text: Tensor, *args: Any, **options: Any) -> Any:
        """Encodes texts [N, L] of any L: the tower is given the first L positions, and the mask of L tokens."""
        encode, tower = getattr(type(self.model), self.name), _tower(self.model)
        position, mask = tower._parameters.get("positional_embedding"), tower._buffers.get("attn_mask")
        length, own = text.shape[1], vars(tower)
        # Hugging Face's towers, and towers with a class token, choose their positions and masks themselves.
        if position is None or len(position) == length or getattr(tower, "cls_emb", None) is not None:
            return encode(self.model, text, *args, **options)
        cut = {"positional_embedding": position[:length]}
        if mask is not None:
            cut["attn_mask"] = mask[:length, :length]
        own.update(cut)
        try:
            return encode(self.model, text, *args, **options)
        finally:
            for name in cut:
                del own[name]


def lengths_of(text: Tensor) -> Tensor:
    """Counts the tokens of each text [N, L] and its first padding token. Padding is the run of equal tokens at the end."""
    run = (text == text[:, -1:]).flip(1).cumprod(1).sum(1)
    return text.shape[1] + 1 - run


def try_crop(model: Any, multiple: int = 8, groups: int = 4) -> TextCrop | str:
    """Crops the texts of a model, or returns why they cannot be cropped, by a trial with one text on the model's device."""
    if not hasattr(model, "encode_text") or not hasattr(model, "visual"):
        return type(model).__name__
    tower = _tower(model)
    if hasattr(model, "text_decoder"):
        return f"{type(model).__name__}, whose decoder reads the features of all tokens"
    weight = _embedding(model).weight
    if type(weight) not in (nn.Parameter, Tensor) or weight.is_meta:
        return "weights without values"  # fake tensors, in predictions of memory
    if any(isinstance(vars(model).get(name), TextCrop) for name in ("encode_text", "_encode_text")):
        return "one whose texts are cropped already"
    for block in (getattr(tower, "transformer", None) or tower).modules():
        if isinstance(block, SimplifiedBlock) and not (block.causal or getattr(block, "masks_padding", False)):
            # A new block passes on only the token itself, so that the trial would not show what its tokens see.
            return "simplified blocks in which every token sees every token (simplify's mask_padding masks padding)"
        if isinstance(block, _BatchNorm) and block.training:
            return "batch norms in training mode, whose statistics count padding"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False):
            # Weights that were made under inference_mode cannot have gradients; their copies can.
            reach = _reach(copy.deepcopy(model) if weight.is_inference() else model)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return f"a text tower that takes no shorter texts: {str(error).strip().splitlines()[0]}"
    finally:
        for module, training in modes:
            module.training = training
    return reach if isinstance(reach, str) else TextCrop(model, multiple, groups, reach)


def _reach(model: Any) -> int | str:
    """Returns the `reach` of `TextCrop` for a model in eval mode; or the reason why its texts cannot be cropped."""
    numbers = torch.Generator().manual_seed(0)  # leaves the run's generator as it is
    text, embeddings = _probe(model, numbers), []

    def note(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    hook = _embedding(model).register_forward_hook(note)
    try:
        with torch.enable_grad():
            found = model.encode_text(text)
            weights = torch.randn(found.shape, generator=numbers).to(found)
            (gradient,) = torch.autograd.grad((found * weights).sum(), embeddings)
    finally:
        hook.remove()
    last = int(gradient[0].ne(0).any(1).nonzero().max())
    if last == text.shape[1] - 1:
        return "a text tower in which padding changes features"
    crop = TextCrop(model, 1, 1, max(0, last + 1 - int(lengths_of(text))))
    try:
        with torch.no_grad():
            cropped = model.encode_text(text)
    finally:
        crop.undo()
    worst = (cropped - found).detach().abs().max() / found.detach().abs().max()
    rounding = torch.finfo(found.dtype).eps ** 0.6  # 7e-5 in float32, 3e-2 in bfloat16
    return crop.reach if worst <= rounding else f"a text tower in which shorter texts change features by {worst:.1e}"


def _probe(model: Any, numbers: torch.Generator) -> Tensor:
    """Returns a random text [1, L], of which a fifth are tokens and the rest is padding."""
    weight, tower = _embedding(model).weight, _tower(model)
    config = getattr(tower, "config", None)
    padding = next((n for n in (getattr(tower, "pad_id", None), getattr(config, "pad_token_id", None)) if n is not None), 0)
    # The end of a text is the token with the highest id, unless the tower names its end token.
    said = getattr(model, "text_eos_id", None) if tower is model else getattr(tower, "eos_id", None)
    pool = getattr(model, "text_pool_type", None) or getattr(tower, "pool_type", "argmax")
    length = getattr(model, "context_length", None) or tower.context_length
    count = max(3, length // 5)
    text = torch.full((1, length), padding)
    text[0, : count - 1] = torch.randint(min(5, len(weight) - 2), len(weight) - 1, (count - 1,), generator=numbers)
    text[0, count - 1] = said if pool == "eos" and said is not None else len(weight) - 1
    return text.to(weight.device)


def _tower(model: Any) -> Any:
    return getattr(model, "text", model)  # open_clip's CLIP is its own text tower


def _embedding(model: Any) -> nn.Embedding:
    """The embedding of the tokens."""
    tower = _tower(model)
    if hasattr(tower, "token_embedding"):
        return tower.token_embedding
    return tower.transformer.get_input_embeddings()  # Hugging Face


def _cuts(lengths: Tensor, most: int) -> list[int]:
    """Returns where to cut texts sorted by length: the ends of at most `most` groups, at the lowest cost in tokens."""
    values, counts = (t.tolist() for t in lengths.unique(return_counts=True))
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    # best[g][j]: the cost of the first j lengths in g groups, and where the last group begins.
    best: list[list[tuple[float, int]]] = [[(0.0, 0), *[(float("inf"), 0)] * len(values)]]
    for _ in range(min(most, len(values))):
        row = [(float("inf"), 0)]
        for j, value in enumerate(values, 1):
            costs = ((best[-1][i][0] + (ends[j] - ends[i]) * value + GROUP_TOKENS, i) for i in range(j))
            row.append(min(costs))
        best.append(row)
    groups = min(range(1, len(best)), key=lambda g: best[g][-1][0])
    cuts, j = [], len(values)
    for g in range(groups, 0, -1):
        cuts.append(ends[j])
        j = best[g][j][1]
    return cuts[::-1]
