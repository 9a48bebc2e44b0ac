"""Fits the shares of a card's rates that kernels of each kind reach to measured steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simplclip.plan.cards import CARDS
from simplclip.plan.kernels import Kernel
from simplclip.plan.time import FITTED, at_rates

# The share of its rate that a kind reaches before any measurement; the products of some
# convolutions reach less.
EXPECTED = 0.7
EXPECTED_PRODUCTS = {"depthwise": 0.12, "grouped": 0.2}
EXPECTED_LAUNCH_MS = 4e-3
STEPS = 500


@dataclass
class Measured:
    """A step that others measured on a card, and its kernels."""

    card: str
    mode: str
    layout: str
    model: str
    batch: int
    size: int
    ms: float
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def family(self) -> str:
        """The beginning of the model's name, which architectures of one kind share."""
        name = re.sub(r"^(tf|ig|legacy|gluon|ssl|swsl|test)_", "", self.model)
        return re.match(r"[a-z]+", name)[0]


@dataclass
class Fit:
    """What RATES, TRAFFIC and LAUNCHES_MS hold: a number for each card of FITTED."""

    rates: dict[str, tuple[float, ...]]
    traffic: dict[str, tuple[float, ...]]
    launches: tuple[float, ...]

    def ms(self, step: Measured) -> float:
        """Predicts a step; a kind that no fitted step had reaches EXPECTED."""
        index = FITTED.index(step.card)
        card = CARDS[step.card]
        unknown = (EXPECTED,) * len(FITTED)
        total = 0.0
        for kernel in step.kernels:
            products, moved = at_rates(kernel, card)
            products /= self.rates.get(kernel.rate, unknown)[index]
            moved /= self.traffic.get(kernel.traffic, unknown)[index]
            total += kernel.times * max(products, moved, self.launches[index])
        return total


def fit(steps: Sequence[Measured]) -> Fit:
    """Returns the shares with the smallest errors |log(predicted / measured)|, damped.

    Shares stay near what is expected, and those of a kind on different cards near each other,
    unless steps say otherwise.
    """
    kinds: dict[tuple[str, str], int] = {}
    # step, indices of rate and traffic, ms of products and bytes, times
    columns: list[list[float]] = []
    for number, step in enumerate(steps):
        for kernel in step.kernels:
            rate = kinds.setdefault(("rate", kernel.rate), len(kinds))
            traffic = kinds.setdefault(("traffic", kernel.traffic), len(kinds))
            products, moved = at_rates(kernel, CARDS[step.card])
            columns.append([number, rate, traffic, products, moved, kernel.times])
    table = torch.tensor(columns, dtype=torch.float64)
    row, rate, traffic = table[:, :3].long().unbind(1)
    products, moved, times = table[:, 3:].unbind(1)
    measured = torch.tensor([step.ms for step in steps], dtype=torch.float64)
    card = torch.tensor([FITTED.index(step.card) for step in steps])[row]
    expected = torch.tensor([_expected(*kind) for kind in kinds], dtype=torch.float64).logit()
    shared = expected.clone().requires_grad_()
    apart = torch.zeros(len(kinds), len(FITTED), dtype=torch.float64, requires_grad=True)
    expected_launch = math.log(EXPECTED_LAUNCH_MS)
    launch = torch.full_like(apart[0], expected_launch).requires_grad_()

    def error() -> Tensor:
        share = (shared[:, None] + apart).sigmoid()
        longest = torch.maximum(products / share[rate, card], moved / share[traffic, card])
        ms = times * torch.maximum(longest, launch.exp()[card])
        predicted = torch.zeros_like(measured).index_add(0, row, ms)
        wrong = (1 + ((predicted / measured).log() / 0.1) ** 2).sqrt().mean()
        away = 0.02 * ((shared - expected) ** 2).mean() + 0.1 * (apart**2).mean()
        return wrong + away + 0.01 * ((launch - expected_launch) ** 2).mean()

    optimizer = torch.optim.Adam([shared, apart, launch], lr=0.05)
    for step_number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 if step_number < STEPS * 2 / 3 else 0.01
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    share = (shared[:, None] + apart).sigmoid().detach().tolist()
    shares: dict[str, dict[str, tuple[float, ...]]] = {"rate": {}, "traffic": {}}
    for (bound, kind), i in sorted(kinds.items()):
        shares[bound][kind] = _rounded(share[i])
    launches = tuple(round(ms, 4) for ms in launch.exp().tolist())
    return Fit(shares["rate"], shares["traffic"], launches)


def _expected(bound: str, kind: str) -> float:
    """Returns the share that is expected of a kind. bound: "rate" of products, or "traffic"."""
    if bound == "rate":
        return EXPECTED_PRODUCTS.get(kind.split()[0], EXPECTED)
    return EXPECTED


def _rounded(shares: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(share, 3) for share in shares)


def held_out(steps: Sequence[Measured], folds: int = 3) -> list[float]:
    """Predicts each step by a fit to models of other families."""
    families = sorted({step.family for step in steps})
    predicted = [0.0] * len(steps)
    for fold in range(folds):
        out = set(families[fold::folds])
        fitted = fit([step for step in steps if step.family not in out])
        for number, step in enumerate(steps):
            if step.family in out:
                predicted[number] = fitted.ms(step)
    return predicted
