"""The time of a step's work on a card.

An op takes the longest of its products, its bytes and a launch, each at the share of the data
sheet's rate that ops of its kind reach; a step takes the sum. Forward and backward are three times
forward's work.
"""

from __future__ import annotations

from collections.abc import Iterable

from simplclip.plan.cards import CARDS, Card, rows_of
from simplclip.plan.meter import Work

# Shares of the data sheet's rates, and the milliseconds of a launch, by card and mode; "nchw" is
# the share that convolutions, but for grouped ones, keep in this layout. `python -m
# benchmarks.cards --fit` writes the file from steps that timm's authors measured, see docs/plan.md.
# No measured training had fused attention.
RATES = {
    (row.pop("card"), row.pop("mode")): {kind: float(value) for kind, value in row.items()}
    for row in rows_of("rates.csv")
}
MEASURED = {86: "rtx-3090", 89: "rtx-4090", 120: "rtx-5090"}  # by architecture


def rate_of(kind: str, card: Card, training: bool) -> float:
    """Returns a rate of the measured card with this architecture, by default of an RTX 3090.

    In training the others lose what an RTX 3090 loses.
    """
    rate = RATES[MEASURED.get(card.architecture, "rtx-3090"), "infer"][kind]
    if training:
        rate *= RATES["rtx-3090", "train"][kind] / RATES["rtx-3090", "infer"][kind]
    return rate


def traffic_of(work: Work) -> str:
    """Returns the kind of an op's bytes."""
    return "norm" if work.kind == "norm" else "bytes"


def least_ms(work: Work, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of an op's products, and of its bytes, by the data sheet."""
    rate = card.half if work.half else card.float32
    return work.flops / rate / 1e9, work.bytes / card.bandwidth / 1e6


def ms_of(work: Work, card: Card, training: bool) -> float:
    """Returns the likely milliseconds of an op: of forward, or of forward and backward."""
    products, moved = least_ms(work, card)
    products /= rate_of(work.kind, card, training)
    if work.nchw and work.kind != "grouped nchw":
        products /= rate_of("nchw", card, training)
    moved /= rate_of(traffic_of(work), card, training)
    longest = max(products, moved, rate_of("launch", card, training))
    return longest * (3 if training else 1)


def step_ms(works: Iterable[Work], card: str) -> float:
    """Returns the likely milliseconds of a step's work on a card, by its name."""
    total = 0.0
    for work in works:
        if work.runs != 1:
            total += work.times * ms_of(work, CARDS[card], training=False)
        if work.runs:
            total += work.times * ms_of(work, CARDS[card], training=True)
    return total
