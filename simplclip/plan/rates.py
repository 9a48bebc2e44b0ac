"""The time of a step's work on a card.

An op takes the longest of its products, its bytes and a launch, each at the share of the data
sheet's rate that ops of its kind reach; a step takes the sum. Forward and backward are three times
forward's work.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from simplclip.plan.cards import CARDS, Card
from simplclip.plan.meter import Work

# Shares of the data sheet's rates, and the milliseconds of a launch; "nchw" is the share that
# convolutions, but for grouped ones, keep in this layout. Printed by `python -m benchmarks.cards
# --fit` from steps that timm's authors measured, see docs/plan.md.
KINDS = (
    *("product", "convolution", "grouped", "grouped nchw", "depthwise", "attention"),
    *("bytes", "norm", "nchw", "launch"),
)
INFERENCE: dict[str, tuple[float, ...]] = {
    "rtx-3090": (0.9793, 0.9377, 0.243, 0.25, 0.0438, 0.6806, 0.8349, 0.6361, 0.5536, 0.0042),
    "rtx-4090": (0.9706, 0.8453, 0.25, 0.2008, 0.1144, 0.6115, 0.894, 0.5561, 0.699, 0.0047),
    "rtx-5090": (0.9487, 0.8542, 0.25, 0.1972, 0.0668, 0.573, 0.7567, 0.4631, 0.7635, 0.0043),
}
# Forward and backward on an RTX 3090; no measured training had fused attention.
TRAINING = (0.9259, 0.9047, 0.078, 0.1865, 0.0149, 0.5, 0.7367, 0.5964, 0.5809, 0.0045)


def constant(kind: str, card: Card, training: bool) -> float:
    """Returns a constant of the measured card with this architecture, by default of an RTX 3090.

    In training the others lose what an RTX 3090 loses.
    """
    index = KINDS.index(kind)
    name = {89: "rtx-4090", 120: "rtx-5090"}.get(card.architecture, "rtx-3090")
    loss = TRAINING[index] / INFERENCE["rtx-3090"][index] if training else 1.0
    return INFERENCE[name][index] * loss


def traffic_of(work: Work) -> str:
    """Returns the kind of an op's bytes."""
    return "norm" if work.kind == "norm" else "bytes"


def least_ms(work: Work, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of an op's products, and of its bytes, by the data sheet."""
    rate = card.half
    if not work.half:
        is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        rate = card.tf32 if is_tf32 else card.float32
    return work.flops / rate / 1e9, work.bytes / card.bandwidth / 1e6


def ms_of(work: Work, card: Card, training: bool) -> float:
    """Returns the milliseconds of one run of an op; in training those of forward and backward."""
    products, moved = least_ms(work, card)
    products /= constant(work.kind, card, training)
    if work.nchw and work.kind != "grouped nchw":
        products /= constant("nchw", card, training)
    moved /= constant(traffic_of(work), card, training)
    longest = max(products, moved, constant("launch", card, training))
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
