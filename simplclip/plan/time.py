"""The time of kernels on a card: each takes the longest of its multiply-adds, its bytes and a
launch; a step takes the sum.

At the rates of the card's data sheet that is a bound. At the shares of these rates that kernels of
a kind reach, it is what a step likely takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from simplclip.plan.cards import Card
from simplclip.plan.kernels import Kernel

# The data sheet gives the clock that a card reaches on average. Under load cards run up to about a
# tenth above it.
CLOCK = 1.1
LAUNCH_MS = 2e-3  # the least that a kernel takes on the device; assumed
HOST_MS = 8e-3  # what the host takes to start a kernel of torch; assumed

# Shares of the data sheet's rates on an RTX 3090, 4090 and 5090, fitted by `python -m
# benchmarks.cards --fit` to step times that timm's authors published: of models of images in
# float16, trained on a 3090 with torch 1.12, in inference with torch 2.4 (3090 and 4090) and 2.9
# (5090). docs/plan.md has the error. Cards of other architectures take the nearest one's.
FITTED = ("rtx-3090", "rtx-4090", "rtx-5090")
RATES: dict[str, tuple[float, float, float]] = {
    "attention": (0.817, 0.65, 0.565),
    "dense": (0.96, 0.914, 0.91),
    "dense backward": (0.867, 0.816, 0.816),
    "dense backward nchw": (0.793, 0.761, 0.761),
    "dense nchw": (0.58, 0.602, 0.626),
    "depthwise": (0.149, 0.138, 0.138),
    "depthwise backward": (0.023, 0.043, 0.043),
    "depthwise backward nchw": (0.008, 0.024, 0.024),
    "depthwise nchw": (0.028, 0.02, 0.028),
    "grouped": (0.324, 0.273, 0.273),
    "grouped backward": (0.053, 0.09, 0.09),
    "grouped backward nchw": (0.436, 0.336, 0.336),
    "grouped nchw": (0.305, 0.189, 0.245),
    "pointwise": (0.969, 0.944, 0.895),
    "pointwise backward": (0.931, 0.875, 0.875),
    "pointwise backward nchw": (0.902, 0.846, 0.846),
    "pointwise nchw": (0.911, 0.901, 0.88),
    "product": (0.979, 0.967, 0.89),
    "stem": (0.736, 0.715, 0.725),
}
TRAFFIC: dict[str, tuple[float, float, float]] = {
    "convolution": (0.686, 0.791, 0.354),
    "convolution backward": (0.415, 0.526, 0.526),
    "convolution backward nchw": (0.189, 0.357, 0.357),
    "convolution nchw": (0.34, 0.558, 0.39),
    "depthwise": (0.465, 0.809, 0.623),
    "depthwise backward": (0.26, 0.417, 0.417),
    "depthwise backward nchw": (0.7, 0.7, 0.7),
    "depthwise nchw": (0.734, 0.779, 0.73),
    "elementwise": (0.979, 0.984, 0.954),
    "grouped": (0.748, 0.731, 0.731),
    "grouped backward": (0.7, 0.7, 0.7),
    "grouped backward nchw": (0.073, 0.22, 0.22),
    "grouped nchw": (0.165, 0.247, 0.155),
    "moves": (0.362, 0.644, 0.502),
    "norm": (0.957, 0.951, 0.921),
    "norm backward": (0.819, 0.774, 0.774),
    "pool": (0.777, 0.756, 0.694),
    "pool backward": (0.73, 0.719, 0.719),
    "product": (0.312, 0.701, 0.421),
    "reduction": (0.526, 0.691, 0.514),
    "transposed": (0.649, 0.522, 0.4),
}
# Of models of families that the fit had not seen: the median error, and the share that was
# predicted to 35 %.
HELD_OUT: dict[str, tuple[float | None, float | None, float | None]] = {
    "train median_error": (0.06, None, None),
    "train within_35": (0.955, None, None),
    "infer median_error": (0.064, 0.049, 0.063),
    "infer within_35": (0.975, 0.976, 0.989),
}
LAUNCHES_MS = (0.0045, 0.0042, 0.0039)
# Shares of the data sheet's rate of half types that the machine code of this library's kernels
# allows, by architecture: printed by `python -m benchmarks.machine_code --write`.
OWN_ARCHITECTURES = (80, 86, 89, 90, 120)
OWN_RATES: dict[str, tuple[float, ...]] = {
    "own attention backward": (0.35, 0.93, 0.93, 0.16, 0.88),
    "own attention forward": (0.22, 0.88, 0.88, 0.1, 0.87),
    "own gradient": (0.61, 1.0, 1.0, 0.3, 1.0),
    "own gradient, ids": (0.61, 1.0, 1.0, 0.3, 1.0),
    "own gradient, pair matching": (0.61, 1.0, 1.0, 0.23, 1.0),
    "own gradient, teacher": (0.48, 0.93, 0.83, 0.24, 0.83),
    "own mlp hidden": (0.57, 1.0, 0.98, 0.28, 0.98),
    "own sigmoid": (0.47, 0.9, 0.8, 0.23, 0.81),
    "own sigmoid, ids": (0.47, 0.9, 0.8, 0.23, 0.81),
    "own sigmoid, two terms": (0.43, 0.9, 0.8, 0.21, 0.81),
    "own statistics": (0.67, 1.0, 1.0, 0.49, 1.0),
    "own statistics, ids": (0.67, 1.0, 1.0, 0.33, 1.0),
    "own statistics, pair matching": (0.67, 1.0, 1.0, 0.25, 1.0),
    "own statistics, teacher": (0.5, 0.96, 0.86, 0.19, 0.86),
}
# What others measured of their kernels over what the same model says of them: `--peers` of that
# program.
CALIBRATION = 0.74
# Assumed: FlashAttention's backward, which no fitted model has, and of this library's kernels,
# which nobody has measured, the products of float32 and the bytes.
ASSUMED_RATES = {"attention backward": 0.4, "own": 0.5}
ASSUMED_TRAFFIC = {"own": 0.7}


def column(card: Card) -> int:
    """Returns the index of the card in FITTED with this card's architecture, else the 3090's."""
    return {89: 1, 120: 2}.get(card.architecture, 0)


def peak(card: Card, dtype: torch.dtype | None) -> float:
    """Returns the data sheet's TFLOP/s of products of `dtype`; of float32 as torch is set.

    float64 counts as float32; every other dtype, and None, as half types.
    """
    if dtype in (torch.float32, torch.float64):
        return card.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else card.float32
    return card.half


def at_rates(kernel: Kernel, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of a kernel's multiply-adds, and of its bytes, by the data sheet."""
    products = 2 * kernel.multiply_adds / peak(card, kernel.dtype) / 1e9
    return products, kernel.bytes / card.bandwidth / 1e6


def likely_share(kernel: Kernel, card: Card) -> float:
    """Returns the share of the data sheet's rate that a kernel's products likely reach."""
    if kernel.rate in OWN_RATES:
        counted = kernel.dtype in (torch.bfloat16, torch.float16)
        if not counted or card.architecture not in OWN_ARCHITECTURES:
            return ASSUMED_RATES["own"]
        return CALIBRATION * OWN_RATES[kernel.rate][OWN_ARCHITECTURES.index(card.architecture)]
    return ASSUMED_RATES.get(kernel.rate) or RATES[kernel.rate][column(card)]


def likely_ms(kernel: Kernel, card: Card) -> dict[str, float]:
    """Returns the likely milliseconds of one run: {"products": , "bytes": , "launches": }.

    These are what its multiply-adds, bytes and launch take, of which the longest counts.
    """
    products, moved = at_rates(kernel, card)
    index = column(card)
    products /= likely_share(kernel, card)
    moved /= ASSUMED_TRAFFIC.get(kernel.traffic) or TRAFFIC[kernel.traffic][index]
    return {"products": products, "bytes": moved, "launches": LAUNCHES_MS[index]}


def least_ms(kernel: Kernel, card: Card) -> dict[str, float]:
    """Returns the least milliseconds of one run: {"products": , "bytes": , "launches": }.

    The longest of them counts. The L2 cache may hold as much as fits of what a kernel reads, and of
    what it writes.
    """
    products, moved = at_rates(kernel, card)
    cached = 2 * (card.l2 << 20) / card.bandwidth / 1e6
    return {"products": products / CLOCK, "bytes": max(0.0, moved - cached), "launches": LAUNCH_MS}


@dataclass
class StepTime:
    """The milliseconds of a step on a card. shares: of `likely`, by what bounds its kernels."""

    likely: float = 0.0  # of the card's kernels
    least: float = 0.0
    # what the host takes to start the kernels, which it does while the card computes
    host: float = 0.0
    launches: int = 0
    own: float = 0.0  # of this library's kernels, within `likely`
    shares: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("products", "convolutions", "memory", "launches"), 0.0
        )
    )

    @property
    def ms(self) -> float:
        """Likely milliseconds of the step: the host starts kernels while the card computes."""
        return max(self.likely, self.host)


def step_time(kernels: Iterable[Kernel], card: Card) -> StepTime:
    """Returns the time of a step's kernels on a card, one after the other, each `times` times.

    Waits of the host, which are among them, take no time.
    """
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
        if kernel.by != "torch":
            total.own += ms
        if bound == "products" and "convolution" in kernel.name:
            bound = "convolutions"
        total.shares["memory" if bound == "bytes" else bound] += ms
    total.shares = {name: ms / total.likely for name, ms in total.shares.items() if total.likely}
    total.host = HOST_MS * total.launches
    return total
