"""The cards that plans know: cards.csv, from NVIDIA's data sheets and white papers.

GeForce cards multiply half types at half the rate if they sum in float32, which torch does; the
others do not. A100, H100 and H200 are SXM modules, V100 is SXM2. The RTX 3080 is that of 10 GB.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

GIB = 2**30


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


def rows_of(name: str) -> list[dict[str, str]]:
    """Returns the rows of a CSV file of this folder."""
    with open(Path(__file__).with_name(name), newline="") as file:
        return list(csv.DictReader(file))


CARDS = {
    row.pop("name"): Card(**{field: json.loads(value) for field, value in row.items()})
    for row in rows_of("cards.csv")
}
