"""The time of a step's work on a card.

An op takes the longest of its products, its bytes and a launch, each at the share of the data
sheet's rate that ops of its kind reach; a step takes the sum. Forward and backward are three times
forward's work.
"""

from __future__ import annotations

from collections.abc import Iterable

from simplclip.plan.cards import CARDS, Card
from simplclip.plan.meter import Work

# Fitted by `python -m benchmarks.cards --fit` to step times that timm's authors published, see
# docs/plan.md: shares of the data sheet's rates, and milliseconds of a launch. "nchw" is the share
# of a convolution's rate that remains in this layout.
INFERENCE: dict[str, dict[str, float]] = {c: {"product": .9, "convolution": .8, "grouped": .25, "depthwise": .1, "attention": .6, "bytes": .9, "norm": .8, "launch": .004, "nchw": .7} for c in ("rtx-3090", "rtx-4090", "rtx-5090")}
TRAINING: dict[str, float] = dict(INFERENCE["rtx-3090"])  # of an RTX 3090


def card_of_rates(card: Card) -> str:
    """Returns the measured card whose shares a card takes, that of its architecture."""
    return {89: "rtx-4090", 120: "rtx-5090"}.get(card.architecture, "rtx-3090")


def constant(kind: str, card: Card, training: bool) -> float:
    """Returns a constant of a card; other cards lose in training what an RTX 3090 loses."""
    shares = INFERENCE[card_of_rates(card)]
    return shares[kind] * (TRAINING[kind] / INFERENCE["rtx-3090"][kind] if training else 1.0)


def ms_of(work: Work, card: Card, training: bool) -> float:
    """Returns the milliseconds of one run of an op; in training those of forward and backward."""
    kind, _, layout = work.kind.partition(" ")
    products, moved = least_ms(work, card)
    if products:
        products /= constant(kind, card, training)
    if layout:
        products /= constant(layout, card, training)
    moved /= constant("norm" if kind == "norm" else "bytes", card, training)
    longest = max(products, moved, constant("launch", card, training))
    return longest * (3 if training else 1)


def least_ms(work: Work, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of an op's products, and of its bytes, by the data sheet."""
    rate = card.half if work.half else card.float32
    return work.flops / rate / 1e9, work.bytes / card.bandwidth / 1e6


def step_ms(works: Iterable[Work], card: str) -> float:
    """Returns the likely milliseconds of a step's work on a card, by its name."""
    total = 0.0
    for work in works:
        if work.runs != 1:
            total += work.times * ms_of(work, CARDS[card], training=False)
        if work.runs:
            total += work.times * ms_of(work, CARDS[card], training=True)
    return total
