"""Groups of neighbouring blocks that share weights, for a budget of parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models.simplify import block_sites, build_block, count_parameters
from simplclip.nn import SHARED_PARTS
from simplclip.sharing.likeness import Likeness

_PARTS = {"attention": ("attention",), "mlp": ("mlp",), "all": ("attention", "mlp")}


@dataclass(frozen=True)
class Proposal:
    """Groups of a tower, and its parameters if blocks share `what` among them and all its blocks are simplified.

    fits: whether that is within the budget. If not, it is the least that sharing `what` reaches.
    """

    what: str
    groups: tuple[tuple[int, ...], ...]  # of two blocks and more
    parameters: int
    fits: bool

    def share(self, tower: str) -> dict[str, dict[str, list[list[int]]]]:
        """As `simplify` takes it."""
        return {tower: {self.what: [list(group) for group in self.groups]}} if self.groups else {}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a tower: now, and with simplified blocks, of those outside matrices (rest) and of each block's parts."""

    now: int
    rest: int
    parts: dict[str, list[int]]  # "attention", "mlp" -> by block
    shapes: dict[str, list[tuple]]  # blocks of equal shape can share the part

    def total(self, what: str, groups: list[list[int]]) -> int:
        """With `what` shared in `groups`, which have every block once."""
        alone = [[i] for group in groups for i in group]
        among = {part: groups if part in _PARTS[what] else alone for part in self.parts}
        return self.rest + sum(self.parts[part][group[0]] for part in self.parts for group in among[part])


def sizes(model: nn.Module, tower: str) -> Sizes:
    """Sizes of a tower whose blocks `simplify` replaces by default ones."""
    sites = block_sites(model, tower)
    parts: dict[str, list[int]] = {"attention": [], "mlp": []}
    shapes: dict[str, list[tuple]] = {"attention": [], "mlp": []}
    now = count_parameters(model)[tower]
    rest = now - sum(p.numel() for p in {p for site in sites for p in site.block.parameters()})
    for site in sites:
        block = build_block(site)
        for part, layers in (("attention", (block.qk,)), ("mlp", (block.fc1, block.fc2))):
            parts[part].append(sum(p.numel() for layer in layers for p in layer.parameters()))
        rest += sum(p.numel() for p in block.parameters()) - parts["attention"][-1] - parts["mlp"][-1]
        shapes["attention"].append((block.width, block.heads, block.causal))
        shapes["mlp"].append((block.width, block.hidden, block.act))
    return Sizes(now, rest, parts, shapes)


def parse_budget(text: str | int, whole: int) -> int:
    """Parameters: a number such as 9780000 or 9.78M, or a percentage of `whole`."""
    match = re.fullmatch(r"([\d_,]*\.?\d+)\s*([kM%]?)", str(text).strip())
    number = float(match[1].replace("_", "").replace(",", "")) if match else 0.0
    if not number:
        raise InputError(f"budget: expected a number of parameters such as 9.78M, or a percentage such as 80%, got {text!r}")
    return math.floor(number * {"": 1, "k": 10**3, "M": 10**6, "%": whole / 100}[match[2]])


def distances(likeness: Likeness, what: str) -> Tensor:
    """What makes blocks costly to merge, from 0 to 1, [n, n]: for attention the divergence of the maps over ln 2; for MLPs
    half of 1 - the cosine of updates; for all the mean of both."""
    found = {"attention": likeness.attention / math.log(2), "mlp": (1 - likeness.updates) / 2}
    return torch.stack([found[part] for part in _PARTS[what]]).mean(0)


def propose(likeness: Likeness, sizes: Sizes, budget: int) -> list[Proposal]:
    """Groups by which a tower is within the budget, for each of "attention", "mlp" and "all".

    Starting from single blocks, the two neighbouring groups of lowest mean distance (see `distances`) over the pairs of their
    blocks are merged until the tower is within the budget, or all are. Raises InputError if nothing is within the budget.
    """
    found = []
    for what in SHARED_PARTS:
        distance = distances(likeness, what)
        groups = [[i] for i in range(len(likeness.paths))]
        while sizes.total(what, groups) > budget:
            costs = {
                at: torch.stack([distance[i, j] for i, j in product(groups[at], groups[at + 1])]).mean().item()
                for at in range(len(groups) - 1)
                if all(sizes.shapes[part][groups[at][0]] == sizes.shapes[part][groups[at + 1][0]] for part in _PARTS[what])
            }
            costs = {at: cost for at, cost in costs.items() if not math.isnan(cost)}
            if not costs:
                break
            at = min(costs, key=lambda at: costs[at])
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
        total = sizes.total(what, groups)
        shared = tuple(tuple(group) for group in groups if len(group) > 1)
        found.append(Proposal(what, shared, total, total <= budget))
    if not any(proposal.fits for proposal in found):
        raise InputError(
            f"budget: expected at least {min(p.parameters for p in found):,} parameters of the {likeness.tower} tower, the "
            f"least that sharing reaches, got {budget:,}"
        )
    return found
