"""Finds blocks of a tower whose attention maps are alike, so that they may share weights.

    python -m benchmarks.share open_clip:ViT-B-32/openai --data 'shards/val-*.tar' --budget 60%
    python -m benchmarks.share mobileclip-s0 --checkpoint mobileclip_s0.pt \\
        --data 'shards/val-*.tar' --tower image --out share-s0

Prints the Jensen-Shannon divergence of the attention maps of neighbouring blocks, from 0 for equal
maps to ln 2 = 0.69 nats, and the value of `share` with which the tower keeps within the budget.
share.json has all pairs of blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import simplclip
from simplclip.common.errors import InputError
from simplclip.data import HeldOut, held_out
from simplclip.data.transforms import finish_on_device
from simplclip.models.simplify import attention_of, block_sites, build_block, count_parameters
from simplclip.nn import SimplifiedBlock

BATCH = 8
SHARED_LAYERS = {"attention": ("qk",), "mlp": ("fc1", "fc2"), "all": ("qk", "fc1", "fc2")}


def inputs_of(
    encoder: Any, tower: str, split: HeldOut, samples: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields inputs of a tower, and how many first tokens count in each (None: all)."""
    text_tower = vars(getattr(encoder.model, "text", None) or encoder.model)
    argmax = text_tower.get("pool_type", text_tower.get("text_pool_type", "argmax")) == "argmax"
    for images, rows, _ in split.batches(encoder.preprocess, BATCH):
        if not rows:
            continue
        if tower == "image":
            inputs = finish_on_device(encoder.preprocess, images[:samples], encoder.device)
            lengths = None
        else:
            captions = [row.captions[0] for row in rows if row.captions][:samples]
            if not captions:
                continue
            inputs = encoder.tokenizer(captions)
            # Where a tower pools by argmax, the end of a text has the highest id, and the tokens
            # behind it are padding.
            lengths = inputs.argmax(1) + 1 if argmax else None
        yield inputs, lengths
        samples -= len(inputs)
        if samples == 0:
            return


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
    their index) and samples; NaN for two blocks with different numbers of heads or tokens.

    model: in eval mode. batches: as of `inputs_of`. encode: runs the tower on inputs. Raises
    InputError for fewer than two blocks, attention of an unknown kind, or no sample.
    """
    sites = block_sites(model, tower)
    if len(sites) < 2:
        raise InputError(f"{tower}: expected at least two blocks to compare, got {len(sites)}")
    causal = [getattr(site.block, "causal", site.options.get("causal", False)) for site in sites]
    # number of a block -> its q and k in the current batch, [B, H, L, K]
    queries_keys: dict[int, tuple[Tensor, Tensor]] = {}
    total = torch.zeros(len(sites), len(sites), dtype=torch.float64)
    samples = 0

    def record(i: int, module: Any, args: tuple) -> None:
        x = args[0]
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        queries_keys[i] = _queries_keys(module, x.float())

    with ExitStack() as stack:
        for i, site in enumerate(sites):
            module = site.block
            if not isinstance(module, SimplifiedBlock):
                module = attention_of(module)
            stack.callback(module.register_forward_pre_hook(partial(record, i)).remove)
        for inputs, lengths in batches:
            encode(inputs)
            for row in range(len(inputs)):
                length = None if lengths is None else int(lengths[row])
                maps = []
                for i in range(len(sites)):
                    q, k = queries_keys[i]
                    maps.append(_map(q[row], k[row], causal[i])[:, :length])
                total += _sample_divergences(maps).cpu()
            samples += len(inputs)
    if not samples:
        raise InputError(f"{tower}: expected at least one sample, got none")
    return (total + total.T) / samples


def _sample_divergences(maps: list[Tensor]) -> Tensor:
    """Computes the divergences above the diagonal of [n, n] of n maps [heads, queries, keys]."""
    divergence = torch.zeros(len(maps), len(maps), dtype=torch.float64, device=maps[0].device)
    entropies = [torch.special.entr(p).sum(-1) for p in maps]
    for i, j in combinations(range(len(maps)), 2):
        if maps[i].shape == maps[j].shape:
            mixed = torch.special.entr((maps[i] + maps[j]) / 2).sum(-1)
            difference = mixed - (entropies[i] + entropies[j]) / 2
            divergence[i, j] = difference.clamp_min(0).double().mean()
        else:
            divergence[i, j] = torch.nan
    return divergence


def _map(q: Tensor, k: Tensor, causal: bool) -> Tensor:  # [H, L, K] -> [H, L, L]
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


def _queries_keys(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes q and k [B, H, L, K] of a simplified block or an attention from its input."""
    if getattr(module, "logit_scale", None) is not None:
        raise InputError("attention: expected products of q and k, got scaled cosine attention")
    if isinstance(module, SimplifiedBlock):
        heads, parts = module.heads, F.linear(module.norm(x), module.qk.weight).chunk(2, -1)
    else:
        # of timm, of MobileCLIP; else torch's
        layer = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
        if layer:
            weight, bias = layer.weight, layer.bias
        else:
            weight, bias = module.in_proj_weight, module.in_proj_bias
        heads, parts = module.num_heads, F.linear(x, weight, bias).chunk(3, -1)[:2]
    q, k = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    if hasattr(module, "q_norm"):  # the names in timm
        q, k = module.q_norm(q), module.k_norm(k)
    if hasattr(module, "ln_q"):  # the names in open_clip
        q, k = module.ln_q(q), module.ln_k(k)
    return q, k


def parse_budget(text: str, whole: int) -> int:
    """Parses a number of parameters, such as 9780000 or 9.78M, or a percentage of `whole`.

    Raises InputError.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM%]?)", text)
    if not match or not float(match[1]):
        raise InputError(
            "budget: expected a number of parameters such as 9.78M, or a percentage such as 80%, "
            f"got {text!r}"
        )
    units = {"": 1, "k": 10**3, "M": 10**6, "%": whole / 100}
    return int(float(match[1]) * units[match[2]])


def propose(model: nn.Module, tower: str, divergence: Tensor, budget: int) -> list[dict[str, Any]]:
    """Proposes which weights the simplified blocks of a tower share to keep within the budget.

    The two neighbouring groups of lowest mean divergence, over all pairs of a block of one and a
    block of the other, are merged until the tower is within the budget. Blocks of different shapes
    or numbers of tokens never share.

    Returns for each of "attention", "mlp" and "all" that reaches the budget: "what", the argument
    "share" of `simplify`, and the "parameters" of the tower. Raises InputError if none does.
    """
    sites = block_sites(model, tower)
    blocks = [build_block(site) for site in sites]
    shapes = [(block.width, block.heads, block.hidden, block.act, block.causal) for block in blocks]
    unshared = count_parameters(model)[tower] + sum(map(_size, blocks))
    unshared -= _size(nn.ModuleList(site.block for site in sites))
    merges = _merges(divergence, shapes)
    proposals, least = [], unshared
    for part, names in SHARED_LAYERS.items():
        sizes = [sum(_size(getattr(block, name)) for name in names) for block in blocks]
        for groups in merges:
            parameters = unshared - sum(sizes[i] for group in groups for i in group[1:])
            least = min(least, parameters)
            if parameters <= budget:
                shared = [group for group in groups if len(group) > 1]
                share = {tower: {part: shared}} if shared else {}
                proposals.append({"what": part, "share": share, "parameters": parameters})
                break
    if not proposals:
        raise InputError(
            f"budget: expected at least {least:,} parameters, the least that sharing reaches, got "
            f"{budget:,}"
        )
    return proposals


def _merges(divergence: Tensor, shapes: list[tuple]) -> list[list[list[int]]]:
    """Returns the groups of blocks before the first merge and after each."""
    groups = [[i] for i in range(len(shapes))]
    merges = [groups]
    while True:
        means = {}  # of neighbouring groups, by the index of the first
        for i, (group, following) in enumerate(pairwise(groups)):
            mean = divergence[group][:, following].mean().item()
            if shapes[group[0]] == shapes[following[0]] and not math.isnan(mean):
                means[i] = mean
        if not means:
            return merges
        i = min(means, key=means.__getitem__)
        groups = [*groups[:i], groups[i] + groups[i + 1], *groups[i + 2 :]]
        merges.append(groups)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.share", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("model", help="what simplclip.load takes; its blocks may be simplified")
    parser.add_argument("--checkpoint", help="file with the weights of the model")
    parser.add_argument(
        "--data", required=True, help="pairs, as in evaluate; the first samples are used"
    )
    parser.add_argument("--tower", choices=("text", "image"), default="text")
    parser.add_argument(
        "--samples", type=int, default=256, help="images or captions to measure (default: 256)"
    )
    parser.add_argument(
        "--budget", help="parameters to keep within, as a number or as 80%% of the tower"
    )
    parser.add_argument("--out", type=Path, default=Path("share"), help="folder for share.json")
    options = parser.parse_args(arguments)
    tower, split = options.tower, held_out(options.data, captions=1)
    encoder = simplclip.load(options.model, options.checkpoint)
    size = count_parameters(encoder.model)[tower]
    budget = parse_budget(options.budget, size) if options.budget else None

    batches = list(inputs_of(encoder, tower, split, options.samples))
    divergence = divergences(encoder.model, tower, batches, partial(encoder.features, tower))
    samples = sum(len(inputs) for inputs, _ in batches)
    proposals = []
    if budget is not None:
        proposals = propose(encoder.model, tower, divergence, budget)

    print(f"{tower}: {len(divergence)} blocks, {samples} samples, {size:,} parameters")
    print("blocks    divergence of attention maps (nats)")
    for i, value in enumerate(divergence.diagonal(1).tolist()):
        print(f"{f'{i}, {i + 1}':<10}{value:.4f}")
    for proposal in proposals:
        share = yaml.safe_dump(proposal["share"], default_flow_style=True, width=10**6).strip()
        print(f"{proposal['what']}: {proposal['parameters']:,} parameters")
        print(f"  model.options.simplify_options.share={share}")
    report = {
        "model": options.model,
        "data": options.data,
        "samples": samples,
        "tower": tower,
        "parameters": size,
        "attention_divergence": [
            [None if math.isnan(x) else x for x in row] for row in divergence.tolist()
        ],
        "proposals": proposals,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "share.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
