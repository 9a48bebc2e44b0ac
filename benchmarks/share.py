"""Finds blocks of a tower whose attention maps are alike, so that they may share weights.

    python -m benchmarks.share open_clip:ViT-B-32/openai --data 'shards/val-*.tar' --groups 8

Prints the Jensen-Shannon divergence of the attention maps of neighbouring blocks, from 0 for equal
maps to ln 2 = 0.69 nats, and a value of `share` with which the blocks form so many groups: the two
neighbouring groups of lowest mean divergence are merged until then. simplify says which blocks
cannot share.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simplclip
from simplclip.common.errors import InputError
from simplclip.data import held_out
from simplclip.data.transforms import finish_on_device

BATCH = 8


def attentions_of(model: nn.Module, tower: str) -> list[nn.Module]:
    """Returns the attention modules of a tower in order: of torch, open_clip, timm, MobileCLIP."""
    found = []
    for name, module in model.named_modules():
        in_tower = name.startswith("visual.") == (tower == "image")
        products = ("in_proj_weight", "qkv", "qkv_proj")
        if in_tower and any(getattr(module, each, None) is not None for each in products):
            found.append(module)
    return found


def attention_map(module: Any, inputs: tuple, options: dict) -> Tensor:
    """Computes the attention [B, H, L, L] of a module from its arguments."""
    if getattr(module, "logit_scale", None) is not None:
        raise InputError("attention: expected products of q and k, got scaled cosine attention")
    x = inputs[0].float()
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    layer = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
    if layer is None:
        weight, bias = module.in_proj_weight, module.in_proj_bias
    else:
        weight, bias = layer.weight, layer.bias
    parts = F.linear(x, weight, bias).chunk(3, -1)[:2]
    q, k = (part.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for part in parts)
    for norms in (("q_norm", "k_norm"), ("ln_q", "ln_k")):  # the names in timm and in open_clip
        if hasattr(module, norms[0]):
            q, k = getattr(module, norms[0])(q), getattr(module, norms[1])(k)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = options.get("attn_mask")
    return (logits if mask is None else logits + mask).softmax(-1)


@torch.no_grad()
def divergences(
    model: nn.Module,
    tower: str,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    encode: Callable[[Tensor], Any],
) -> Tensor:
    """Computes the Jensen-Shannon divergence of the attention maps of each two of n blocks, [n, n].

    It is H((p + q) / 2) - (H(p) + H(q)) / 2 in nats, where p and q are the attention of two blocks
    for one query and H is the entropy. The result is the mean over queries, heads (compared by
    their index) and samples; infinite for two blocks with different numbers of heads or tokens.

    model: in eval mode. batches: inputs of the tower, and how many first tokens count in each
    (None: all). encode: runs the tower on inputs. Raises InputError for fewer than two blocks,
    scaled cosine attention, or no sample.
    """
    modules = attentions_of(model, tower)
    if len(modules) < 2:
        raise InputError(f"{tower}: expected at least two blocks to compare, got {len(modules)}")
    maps: dict[int, Tensor] = {}  # by block, of the current batch
    total = torch.zeros(len(modules), len(modules), dtype=torch.float64)
    samples = 0

    def record(i: int, module: nn.Module, inputs: tuple, options: dict) -> None:
        maps[i] = attention_map(module, inputs, options)

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            hook = module.register_forward_pre_hook(partial(record, i), with_kwargs=True)
            stack.callback(hook.remove)
        for inputs, lengths in batches:
            encode(inputs)
            samples += len(inputs)
            entropies = [torch.special.entr(maps[i]).sum(-1) for i in range(len(modules))]
            for i, j in combinations(range(len(modules)), 2):
                if maps[i].shape != maps[j].shape:
                    total[i, j] = torch.inf
                    continue
                mixed = torch.special.entr((maps[i] + maps[j]) / 2).sum(-1)
                each = mixed - (entropies[i] + entropies[j]) / 2
                each = each.clamp_min(0).mean(1)  # [B, queries]
                counted = torch.ones_like(each)
                if lengths is not None:
                    counted = (torch.arange(each.shape[1]) < lengths[:, None]).to(each)
                total[i, j] += ((each * counted).sum(1) / counted.sum(1)).sum().double().cpu()
    if not samples:
        raise InputError(f"{tower}: expected at least one sample, got none")
    return (total + total.T) / samples


def merged(divergence: Tensor, count: int) -> list[list[int]]:
    """Returns `count` groups of neighbouring blocks, or more if no others may be merged."""
    groups = [[i] for i in range(len(divergence))]
    while len(groups) > count:
        means = [divergence[a][:, b].mean().item() for a, b in pairwise(groups)]
        i = min(range(len(means)), key=means.__getitem__)
        if means[i] == torch.inf:
            break
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
    return groups


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.share", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="what simplclip.load takes")
    parser.add_argument("--data", required=True, help="pairs, as in evaluate")
    parser.add_argument("--tower", choices=("text", "image"), default="text")
    parser.add_argument("--samples", type=int, default=256, help="the first ones count")
    parser.add_argument("--groups", type=int, default=1, help="how many groups to form")
    options = parser.parse_args(arguments)
    tower, encoder = options.tower, simplclip.load(options.model)
    text_tower = vars(getattr(encoder.model, "text", None) or encoder.model)
    # Where a tower pools by argmax, the end of a text has the highest id; padding is behind it.
    ends = text_tower.get("pool_type", text_tower.get("text_pool_type", "argmax")) == "argmax"
    batches: list[tuple[Tensor, Tensor | None]] = []
    for images, rows, _ in held_out(options.data, captions=1).batches(encoder.preprocess, BATCH):
        if len(batches) * BATCH >= options.samples:
            break
        captions = [row.captions[0] for row in rows if row.captions]
        if tower == "image" and rows:
            batches.append((finish_on_device(encoder.preprocess, images, encoder.device), None))
        elif captions:
            tokens = encoder.tokenizer(captions)
            batches.append((tokens, tokens.argmax(1) + 1 if ends else None))
    divergence = divergences(encoder.model, tower, batches, partial(encoder.features, tower))
    print(f"{tower}: {sum(len(inputs) for inputs, _ in batches)} samples")
    print("blocks    divergence of attention maps (nats)")
    for i, value in enumerate(divergence.diagonal(1).tolist()):
        print(f"{f'{i}, {i + 1}':<10}{value:.4f}")
    shared = [group for group in merged(divergence, options.groups) if len(group) > 1]
    print(f"model.options.simplify_options.share={{{tower}: {{attention: {shared}}}}}")


if __name__ == "__main__":
    main()
