"""Layer-wise distillation: each simplified block learns the output of the block that it replaced.

    blocks = BlockDistillation(student, original, [block.path for block in report.replaced])
    with blocks.watch() as distances:
        features = student.encode_image(images)
    loss = loss + torch.cat(distances, 1).mean()

Only the original's blocks are kept, not the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simplclip.models.inherit import DIFFERS, NEW, InheritanceError, Source, inherit
from simplclip.models.registry import create

__all__ = ["BlockDistillation", "block_distance", "load_original", "text_lengths", "text_pool"]


def block_distance(output: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The distance of a block's output to a target, for each sample of the batch:

        d = mean over tokens and channels of (LN(output) - LN(target))² / 2

    LN is a layer norm over the channels without weights. So d is 1 minus the correlation over channels (0: alike, 1:
    unrelated, 2: opposite) wherever the variance is far above LN's eps, 1e-5. Scale and shift of a token do not count: a
    residual stream grows from block to block, while a simplified block has no skip connection and normalises its input.
    Where the last block's output is read without a norm, as by FastViT's last convolution, other terms must teach its scale.

    Args:
        output, target: [B, L, C], or maps [B, C, H, W].
        lengths: [B], the tokens of each sample that count, at least 1; all if None.

    Returns [B, 1], float32 (float64 for float64).
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    a, b = (t.flatten(2).transpose(1, 2) if t.dim() == 4 else t for t in (output, target))
    a, b = (F.layer_norm(t.to(wide), t.shape[-1:]) for t in (a, b))
    of_tokens = (a - b).square().mean(-1) / 2
    if lengths is None:
        return of_tokens.mean(1, keepdim=True)
    counts = torch.arange(of_tokens.shape[1], device=of_tokens.device) < lengths[:, None]
    return (of_tokens * counts).sum(1, keepdim=True) / lengths[:, None]


class BlockDistillation:
    """Distils the blocks of a model that `simplify` replaced from those of the original model.

    The targets of a tower's blocks are computed while the student runs: the original's stream starts from the student's input
    to the first block, passes through the original's blocks without autograd, with the arguments (masks) that the student's
    blocks get, and is the target of each. If another module stands between two blocks, so that the second one's input is not
    the first one's output, the stream starts anew from the student's input there. Where everything before the first block is
    inherited and frozen, the targets are what the original model computes.

    Memory: the original's blocks; one stream of a tower at a time; and until backward the target of each block, C elements
    per token beside the 7C that a simplified block keeps (C with recompute). Everything else of a distance is computed again
    in backward. Time: one forward pass of the original's blocks.

    Args:
        student: the simplified model.
        original: the model with its own blocks and trained weights. Its blocks are frozen and put in eval mode, in place.
        paths: the names of the replaced blocks in both models, `SimplifyReport.replaced`'s `path`.
        dtype: of the weight matrices, e.g. that of autocast, which would cast them at each step; as they are if None.

    Source: Jiao et al. 2020 (TinyBERT, arXiv 1909.10351) and Sun et al. 2020 (MobileBERT, arXiv 2004.02984) distil the
    outputs of layers by their mean squared error; the layer norm before it is this library's choice.
    """

    def __init__(
        self, student: nn.Module, original: nn.Module, paths: Iterable[str], *, dtype: torch.dtype | None = None
    ) -> None:
        paths = list(paths)
        if not paths:
            raise ValueError("paths: expected the names of replaced blocks, got none")
        self.blocks = [student.get_submodule(path) for path in paths]
        self.originals = nn.ModuleList([original.get_submodule(path) for path in paths]).requires_grad_(False).eval()
        for p in self.originals.parameters() if dtype else ():
            if sum(n > 1 for n in p.shape) > 1:  # norms and layer scales stay, which autocast does not cast either
                p.data = p.data.to(dtype)

    @contextmanager
    def watch(self, lengths: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Context for one forward pass of the student, or of one of its towers.

        lengths: [B], see `text_lengths`; those tokens alone count in causal blocks.

        Yields a list that gets `block_distance`, [B, 1], of each block that runs.
        """
        distances: list[Tensor] = []
        stream: Any = None
        last: Any = None  # the output of the last block

        def compare(original: nn.Module, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal stream, last
            with torch.no_grad():
                stream = original(stream if args[0] is last else args[0].detach(), *args[1:], **kwargs)
            last = output
            pair = (
                (output, stream) if getattr(block, "batch_first", True) else (output.transpose(0, 1), stream.transpose(0, 1))
            )
            tokens = lengths if block.causal else None
            distances.append(checkpoint(block_distance, *pair, tokens, use_reentrant=False, preserve_rng_state=False))

        pairs = zip(self.blocks, self.originals)
        handles = [block.register_forward_hook(partial(compare, own), with_kwargs=True) for block, own in pairs]
        try:
            yield distances
        finally:
            stream = last = None
            for handle in handles:
                handle.remove()


def load_original(name: str, source: Source | Sequence[Source], paths: Iterable[str], **options: Any) -> nn.Module:
    """The model that the SiCLIP `name` is made from, `models.create(name, simplified=False, **options)`, with the weights of
    `source`, see `inherit`. The global random generators stay as they are.

    Raises: InheritanceError if the source lacks weights of one of the blocks `paths`, or is none; FileNotFoundError.
    """
    with torch.random.fork_rng(devices=()):
        original = create(name, simplified=False, **options)
    result = inherit(original, source)
    unknown = [row.module for row in result.rows if row.status in (NEW, DIFFERS)]
    for path in paths:
        if any(f"{path}.".startswith(f"{row}.") or row.startswith(f"{path}.") or not row for row in unknown):
            raise InheritanceError(
                f"source: expected weights of the original's {path}, got {', '.join(result.sources)} without"
            )
    return original


def text_pool(model: nn.Module) -> str | None:
    """How open_clip's text tower pools its tokens, e.g. "argmax"; None for other towers."""
    tower: Mapping[str, Any] = vars(getattr(model, "text", None) or model)
    return tower.get("pool_type", tower.get("text_pool_type"))


def text_lengths(model: nn.Module, text: Tensor) -> Tensor | None:
    """The number of tokens of each text [B, L] up to the one that open_clip's text tower pools, [B]; None for other towers.

    In a causal tower the tokens behind it do not change the features.
    """
    tower: Mapping[str, Any] = vars(getattr(model, "text", None) or model)
    pool = text_pool(model)
    if pool == "argmax":
        return text.argmax(-1) + 1
    if pool == "eos":
        return (text == tower.get("eos_id", tower.get("text_eos_id"))).int().argmax(-1) + 1
    return None
