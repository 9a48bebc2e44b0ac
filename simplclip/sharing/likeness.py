"""How alike the blocks of a tower are: divergence of their attention maps, cosines of their outputs and of their updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.models.simplify import attention_of, block_sites
from simplclip.nn import SimplifiedBlock

_NUMBERS = 2**22  # of attention maps at a time, of all blocks together


@dataclass
class Likeness:
    """All pairs of the n blocks of a tower, as means over samples. Pairs of unequal heads, width or tokens are NaN.

    attention: Jensen-Shannon divergence of the softmax attention maps in nats, 0 (equal) to ln 2, head by head of the same
        index; the mean over heads and valid queries.
    updates: cosine of what the blocks add to a token, output - input; of a simplified block, which has no skip connection,
        output - attention_gain alpha n. outputs: cosine of the outputs, which a skip connection makes alike: all that
        earlier blocks have added is in both.
    """

    tower: str
    paths: list[str]
    samples: int
    attention: Tensor  # float64 [n, n], as the next
    updates: Tensor
    outputs: Tensor


class _Seen:
    """What one block did in a batch, in float32."""

    q: Tensor  # [B, H, L, K], as k
    k: Tensor
    input: Tensor  # [B, L, C], as the next
    update: Tensor
    output: Tensor


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    tower: str,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    encode: Callable[[Tensor], Any],
) -> Likeness:
    """Compare the blocks of a tower, those of `models.simplify.block_sites`, on the inputs of `batches`.

    Attention maps are computed again from q and k, for one sample and some queries at a time, and never kept; q, k and the
    outputs of all blocks are kept for one batch.

    Args:
        model: in eval mode. Its blocks may be simplified.
        batches: inputs and, for each sample, the number of its first tokens that count as queries (None: all of them). A
            causal block attends to the tokens up to the query, another one to all, as the model does.
        encode: runs the tower.

    Raises InputError if the tower has fewer than two blocks, or attention of an unknown kind, or if there is no sample.
    """
    sites = block_sites(model, tower)
    if len(sites) < 2:
        raise InputError(f"{tower}: expected a tower with at least two blocks to compare, got {len(sites)}")
    seen = [_Seen() for _ in sites]
    n, samples = len(sites), 0
    sums = torch.zeros(3, n, n, dtype=torch.float64)
    with ExitStack() as stack:
        for site, one in zip(sites, seen):
            _watch(site.block, one, site.options.get("batch_first", True), stack)
        causal = [getattr(site.block, "causal", site.options.get("causal", False)) for site in sites]
        for inputs, lengths in batches:
            encode(inputs)
            shapes = [(one.q.shape[1], *one.output.shape[1:], masked) for one, masked in zip(seen, causal)]
            for shape in dict.fromkeys(shapes):
                members = [i for i, other in enumerate(shapes) if other == shape]
                for row in range(len(inputs)):
                    length = shape[1] if lengths is None else int(lengths[row])
                    found = _compare([seen[i] for i in members], row, length, shape[-1])
                    sums[:, torch.tensor(members)[:, None], torch.tensor(members)] += found.cpu()
            unlike = torch.tensor([[one != other for other in shapes] for one in shapes])
            sums[:, unlike] = torch.nan
            samples += len(inputs)
    if not samples:
        raise InputError(f"{tower}: expected at least one sample, got none")
    attention, updates, outputs = sums / samples
    return Likeness(tower, [site.path for site in sites], samples, attention, updates, outputs)


def _compare(blocks: list[_Seen], row: int, length: int, causal: bool) -> Tensor:
    """Divergence, cosine of updates and of outputs of all pairs for one sample, float64 [3, m, m]."""
    q, k = (torch.stack([getattr(one, name)[row] for one in blocks]) for name in ("q", "k"))  # [m, H, L, K]
    parts = [_divergence(q[:, :, :length], k, causal)]
    for name in ("update", "output"):
        tokens = F.normalize(torch.stack([getattr(one, name)[row, :length] for one in blocks]), dim=-1)  # [m, L, C]
        parts.append(torch.einsum("ilc,jlc->ij", tokens, tokens).double().div(length).clamp(-1, 1))
    return torch.stack(parts)


def _divergence(q: Tensor, k: Tensor, causal: bool) -> Tensor:  # [m, H, Q, K], [m, H, L, K] -> [m, m]
    (m, heads, queries, width), keys = q.shape, k.shape[2]
    found = q.new_zeros(m, m, dtype=torch.float64)
    step = max(1, _NUMBERS // (m * heads * keys))
    for start in range(0, queries, step):
        logits = q[:, :, start : start + step] @ k.transpose(-1, -2) * width**-0.5
        if causal:
            seen = (
                torch.arange(keys, device=q.device) <= torch.arange(start, start + logits.shape[2], device=q.device)[:, None]
            )
            logits = logits.masked_fill(~seen, float("-inf"))
        maps = logits.softmax(-1)
        own = torch.special.entr(maps).sum(-1)
        for i in range(m - 1):
            mixed = torch.special.entr((maps[i] + maps[i + 1 :]) / 2).sum(-1)
            rows = (mixed - (own[i] + own[i + 1 :]) / 2).clamp_min(0).double()  # [m - i - 1, H, q]
            found[i, i + 1 :] += rows.sum((1, 2)) / (heads * queries)
    return found + found.T


def _watch(block: Any, seen: _Seen, batch_first: bool, stack: ExitStack) -> None:
    """Hooks that note what `block` does, until the stack ends."""

    def tokens(x: Tensor) -> Tensor:  # -> float32 [B, L, C]
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x if batch_first else x.transpose(0, 1)
        return x.float()

    def before(module: Any, args: tuple, kwargs: dict) -> None:
        seen.input = tokens(args[0] if args else next(iter(kwargs.values())))

    def attention(module: Any, args: tuple, kwargs: dict) -> None:
        with torch.autocast(args[0].device.type, enabled=False):
            seen.q, seen.k = _queries_keys(module, tokens(args[0]))

    def after(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.output = tokens(output)
        if not isinstance(block, SimplifiedBlock):
            seen.update = seen.output - seen.input
            return
        with torch.autocast(output.device.type, enabled=False):
            n = _normalised(block, seen.input)
            seen.q, seen.k = (_heads(t, block.heads) for t in F.linear(n, block.qk.weight.float()).chunk(2, -1))
            kept = 0.0
            if block.value is None and block.output is None:
                kept = block.attention_gain * block.alpha.repeat_interleave(block.width // block.heads) * n
            seen.update = seen.output - kept

    stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
    if not isinstance(block, SimplifiedBlock):
        stack.callback(attention_of(block).register_forward_pre_hook(attention, with_kwargs=True).remove)


def _normalised(block: SimplifiedBlock, x: Tensor) -> Tensor:
    weight, bias = block.norm.weight.float(), getattr(block.norm, "bias", None)
    if block.norm_name == "rmsnorm":
        return F.rms_norm(x, (block.width,), weight, block.norm.eps)
    return F.layer_norm(x, (block.width,), weight, None if bias is None else bias.float(), block.norm.eps)


def _queries_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, H, L, K] of an attention that is not simplified."""
    if getattr(attention, "logit_scale", None) is not None:
        raise InputError("attention: expected products of q and k, got scaled cosine attention")
    weight, bias = getattr(attention, "in_proj_weight", None), getattr(attention, "in_proj_bias", None)
    if weight is None:
        layer = next(getattr(attention, name) for name in ("qkv", "qkv_proj") if hasattr(attention, name))
        weight, bias = layer.weight, layer.bias
    parts = F.linear(x, weight.float(), None if bias is None else bias.float()).chunk(3, -1)[:2]
    q, k = (_heads(part, attention.num_heads) for part in parts)
    for names in (("q_norm", "k_norm"), ("ln_q", "ln_k")):  # of timm and open_clip
        if hasattr(attention, names[0]):
            q, k = (getattr(attention, name)(t).float() for name, t in zip(names, (q, k)))
    return q, k


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, L, C] -> [B, H, L, K]
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
