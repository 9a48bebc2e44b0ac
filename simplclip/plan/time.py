"""The time of kernels on a card: each takes the longest of its multiply-adds, its bytes and a launch; a step takes the sum.

At the rates of the card's data sheet that is a bound. At the shares of these rates that kernels of a kind reach, it is what
a step likely takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from simplclip.plan.cards import Card
from simplclip.plan.kernels import Kernel

# The data sheet gives the clock that a card reaches on average. Under load cards run up to about a tenth above it.
CLOCK = 1.1
LAUNCH_MS = 2e-3  # the least that a kernel takes on the device; assumed
HOST_MS = 8e-3  # what the host takes to start a kernel of torch; assumed

# Shares of the data sheet's rates on an RTX 3090, 4090 and 5090, fitted by `python -m benchmarks.cards --fit` to step times
# that timm's authors published: of models of images in float16, trained on a 3090 with torch 1.12, in inference with torch
# 2.4 (3090 and 4090) and 2.9 (5090). docs/plan.md has the error. Cards of other architectures take the nearest one's.
FITTED = ("rtx-3090", "rtx-4090", "rtx-5090")
RATES: dict[str, tuple[float, float, float]] = {
    "attention": (0.82, 0.645, 0.542),
    "dense": (0.965, 0.92, 0.917),
    "dense backward": (0.847, 0.8, 0.8),
    "dense backward nchw": (0.706, 0.704, 0.704),
    "dense nchw": (0.561, 0.605, 0.629),
    "depthwise": (0.14, 0.122, 0.086),
    "depthwise backward": (0.034, 0.056, 0.056),
    "depthwise backward nchw": (0.006, 0.019, 0.019),
    "depthwise nchw": (0.023, 0.02, 0.028),
    "grouped": (0.31, 0.265, 0.265),
    "grouped backward": (0.052, 0.088, 0.088),
    "grouped backward nchw": (0.105, 0.134, 0.134),
    "grouped nchw": (0.111, 0.183, 0.204),
    "pointwise": (0.971, 0.947, 0.89),
    "pointwise backward": (0.925, 0.868, 0.868),
    "pointwise backward nchw": (0.843, 0.797, 0.797),
    "pointwise nchw": (0.881, 0.895, 0.862),
    "product": (0.982, 0.967, 0.896),
    "stem": (0.762, 0.732, 0.742),
}
TRAFFIC: dict[str, tuple[float, float, float]] = {
    "convolution": (0.686, 0.805, 0.372),
    "convolution backward": (0.649, 0.668, 0.668),
    "convolution backward nchw": (0.212, 0.377, 0.377),
    "convolution nchw": (0.503, 0.565, 0.389),
    "depthwise": (0.453, 0.819, 0.688),
    "depthwise backward": (0.176, 0.344, 0.344),
    "depthwise backward nchw": (0.7, 0.7, 0.7),
    "depthwise nchw": (0.75, 0.788, 0.732),
    "elementwise": (0.98, 0.983, 0.96),
    "grouped": (0.753, 0.734, 0.734),
    "grouped backward": (0.7, 0.7, 0.7),
    "grouped backward nchw": (0.7, 0.7, 0.7),
    "grouped nchw": (0.282, 0.251, 0.16),
    "moves": (0.46, 0.658, 0.501),
    "norm": (0.961, 0.953, 0.924),
    "norm backward": (0.801, 0.764, 0.764),
    "pool": (0.793, 0.768, 0.687),
    "pool backward": (0.694, 0.696, 0.696),
    "product": (0.31, 0.698, 0.426),
    "reduction": (0.422, 0.604, 0.466),
    "transposed": (0.593, 0.523, 0.392),
}
LAUNCHES_MS = (0.0043, 0.0043, 0.0038)
# Assumed: FlashAttention's backward, which no fitted model has, and this library's kernels, which nobody has measured.
ASSUMED_RATES = {"attention backward": 0.4, "own": 0.5}
ASSUMED_TRAFFIC = {"own": 0.7}


def column(card: Card) -> int:
    """Returns the place of a card's architecture in the fitted constants."""
    return {89: 1, 120: 2}.get(card.architecture, 0)


def peak(card: Card, dtype: torch.dtype | None) -> float:
    """Returns the data sheet's TFLOP/s of products; of float32 as torch is set to compute them."""
    if dtype in (torch.float32, torch.float64):
        return card.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else card.float32
    return card.half


def at_rates(kernel: Kernel, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of a kernel's multiply-adds, and of its bytes, at the data sheet's rates."""
    return 2 * kernel.multiply_adds / peak(card, kernel.dtype) / 1e9, kernel.bytes / card.bandwidth / 1e6


def efficiency(kind: str, fitted: dict[str, tuple[float, float, float]], assumed: dict[str, float], card: Card) -> float:
    return assumed[kind] if kind in assumed else fitted[kind][column(card)]


def likely_ms(kernel: Kernel, card: Card) -> dict[str, float]:
    """Returns what a kernel likely takes for its multiply-adds, bytes and launch, of which the longest counts."""
    products, moved = at_rates(kernel, card)
    products /= efficiency(kernel.rate, RATES, ASSUMED_RATES, card)
    moved /= efficiency(kernel.traffic, TRAFFIC, ASSUMED_TRAFFIC, card)
    return {"products": products, "bytes": moved, "launches": LAUNCHES_MS[column(card)]}


def least_ms(kernel: Kernel, card: Card) -> dict[str, float]:
    """Returns what a kernel takes at least for its multiply-adds, bytes and launch, of which the longest counts.

    The L2 cache may hold as much as fits of what a kernel reads, and of what it writes.
    """
    products, moved = at_rates(kernel, card)
    cached = 2 * (card.l2 << 20) / card.bandwidth / 1e6
    return {"products": products / CLOCK, "bytes": max(0.0, moved - cached), "launches": LAUNCH_MS}


@dataclass
class StepTime:
    """The milliseconds of a step on a card. shares: of `likely`, by what bounds its kernels."""

    likely: float = 0.0
    least: float = 0.0
    host: float = 0.0  # what the host takes to start the kernels, which it does while the card computes
    launches: int = 0
    own: float = 0.0  # of this library's kernels, within `likely`
    shares: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("products", "convolutions", "memory", "launches"), 0.0)
    )


def step_time(kernels: Iterable[Kernel], card: Card) -> StepTime:
    """Returns the time of a step's kernels, one after the other."""
    total = StepTime()
    for kernel in kernels:
        if kernel.by == "host":
            continue
        parts = likely_ms(kernel, card)
        bound = max(parts, key=lambda name: parts[name])
        ms = kernel.times * parts[bound]
        total.likely += ms
        total.least += kernel.times * max(least_ms(kernel, card).values())
        total.launches += kernel.times
        total.own += ms * (kernel.by != "torch")
        if bound == "products" and "convolution" in kernel.name:
            bound = "convolutions"
        total.shares["memory" if bound == "bytes" else bound] += ms
    total.shares = {name: ms / total.likely for name, ms in total.shares.items() if total.likely}
    total.host = HOST_MS * total.launches
    return total
