"""Cards that plans know, and the time that work takes on them.

cards.csv is from NVIDIA's data sheets and white papers. GeForce cards multiply half types at half
the rate if they sum in float32, which torch does; the others do not. A100, H100 and H200 are SXM
modules, V100 is SXM2. The RTX 3080 is that of 10 GB.

rates.csv has the shares of these rates that ops reach by kind, and the milliseconds of a launch, by
card and mode; "nchw" is the share that convolutions in one group, and depthwise ones, keep in this
layout. `python -m benchmarks.cards --fit` writes it from steps that timm's authors measured, see
docs/plan.md. No measured training had fused attention.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
MEASURED = {86: "rtx-3090", 89: "rtx-4090", 120: "rtx-5090"}  # by architecture


class Card(NamedTuple):
    """A data sheet.

    Rates are peaks: dense, without sparsity, products of half types summed in float32.
    """

    memory: int  # GiB
    architecture: int  # compute capability, 86 for 8.6
    multiprocessors: int
    bandwidth: float  # GB/s
    l2: int  # MiB
    half: float  # TFLOP/s of bfloat16 and float16 in tensor cores
    float32: float  # TFLOP/s outside tensor cores


class Work(NamedTuple):
    """What an op of a forward pass does."""

    kind: str  # a column of rates.csv
    flops: float
    bytes: float  # that it reads and writes, each tensor once
    half: bool  # whether tensor cores multiply half types
    runs: int  # 0: without backward; 1: backward follows; 2: in backward it runs once more
    nchw: bool = False  # whether this layout slows it
    times: int = 1


def rows_of(name: str) -> list[dict[str, str]]:
    """Returns the rows of a CSV file of this folder."""
    with open(Path(__file__).with_name(name), newline="") as file:
        return list(csv.DictReader(file))


CARDS = {
    row.pop("name"): Card(**{field: json.loads(value) for field, value in row.items()})
    for row in rows_of("cards.csv")
}
RATES = {
    (row.pop("card"), row.pop("mode")): {kind: float(value) for kind, value in row.items()}
    for row in rows_of("rates.csv")
}


def rates_of(card: Card, training: bool) -> dict[str, float]:
    """Returns the rates of the measured card with this architecture, by default of an RTX 3090.

    In training the others lose what an RTX 3090 loses.
    """
    rates = RATES[MEASURED.get(card.architecture, "rtx-3090"), "infer"]
    if not training:
        return rates
    slow, fast = RATES["rtx-3090", "train"], RATES["rtx-3090", "infer"]
    return {kind: rate * slow[kind] / fast[kind] for kind, rate in rates.items()}


def traffic_of(kind: str) -> str:
    """Returns the kind of the bytes of ops of a kind."""
    return "norm" if kind == "norm" else "bytes"


def least_ms(work: Work, card: Card) -> tuple[float, float]:
    """Returns the milliseconds of an op's products, and of its bytes, by the data sheet."""
    rate = card.half if work.half else card.float32
    return work.flops / rate / 1e9, work.bytes / card.bandwidth / 1e6


def forward_ms(work: Work, card: Card, rates: dict[str, float]) -> float:
    """Returns the likely milliseconds of an op: the longest of products, bytes and a launch."""
    products, moved = least_ms(work, card)
    products /= rates[work.kind] * (rates["nchw"] if work.nchw else 1)
    return max(products, moved / rates[traffic_of(work.kind)], rates["launch"])


def step_ms(works: Iterable[Work], name: str) -> float:
    """Returns the likely milliseconds of a step's work on a card, by its name.

    Forward and backward of an op are three times its forward.
    """
    card = CARDS[name]
    inference, training = rates_of(card, training=False), rates_of(card, training=True)
    total = 0.0
    for work in works:
        if work.runs != 1:
            total += work.times * forward_ms(work, card, inference)
        if work.runs:
            total += 3 * work.times * forward_ms(work, card, training)
    return total
