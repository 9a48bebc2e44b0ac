"""Cards that plans know, and the time that work takes on them.

cards.csv is from NVIDIA's data sheets and white papers. GeForce cards multiply half types at half
the rate if they sum in float32, which torch does; the others do not. A100, H100 and H200 are SXM
modules, V100 is SXM2. The RTX 3080 is that of 10 GB.

rates.csv has the shares of these rates that ops reach by kind, and the milliseconds of a launch, by
card and mode; "nchw" is the share that convolutions in one group, and depthwise ones, keep in this
layout. `python -m benchmarks.cards --fit` writes it from steps that timm's authors measured, see
docs/plan.md. No measured training had fused attention. An RTX 4090 and 5090 lose in training what
an RTX 3090 loses; other architectures have its rates.
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

    @property
    def traffic(self) -> str:
        """The column of its bytes."""
        return "norm" if self.kind == "norm" else "bytes"

    def least_ms(self, card: Card) -> tuple[float, float]:
        """Returns the milliseconds of its products, and of its bytes, by the data sheet."""
        rate = card.half if self.half else card.float32
        return self.flops / rate / 1e9, self.bytes / card.bandwidth / 1e6


def rows_of(name: str) -> list[list[str]]:
    """Returns the rows of a CSV file of this folder; the first one has the columns' names."""
    with open(Path(__file__).with_name(name), newline="") as file:
        return list(csv.reader(file))


CARDS = {name: Card(*map(json.loads, sheet)) for name, *sheet in rows_of("cards.csv")[1:]}
HEAD, *ROWS = rows_of("rates.csv")
RATES = {(card, mode): dict(zip(HEAD[2:], map(float, rates))) for card, mode, *rates in ROWS}


def step_ms(works: Iterable[Work], name: str) -> float:
    """Returns the likely milliseconds of a step's work on a card, by its name.

    An op takes the longest of products, bytes and a launch; its forward and backward together take
    three times that.
    """
    card = CARDS[name]
    measured = MEASURED.get(card.architecture, "rtx-3090")
    total = 0.0
    for work in works:
        products, moved = work.least_ms(card)
        for mode, runs in (("infer", work.runs != 1), ("train", 3 * (work.runs > 0))):
            rates = RATES[measured, mode]
            slowed = rates[work.kind] * (rates["nchw"] if work.nchw else 1)
            longest = max(products / slowed, moved / rates[work.traffic], rates["launch"])
            total += runs * work.times * longest
    return total
