"""Losses on cards with fast tensor cores: by this library's kernels, and as products of cuBLAS with
an elementwise kernel, in chunks that stay in the L2 cache. The second form does not exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.machine_code.pipes import CONSTANTS
from benchmarks.results_file import RESULTS, read_csv
from simplclip.plan.cards import CARDS
from simplclip.plan.time import CALIBRATION

SIZES = ((32768, 512), (65536, 768))  # pairs, width
# Shares of the data sheet's rate that others measured for cuBLAS in float16, of 8,192 squared:
# https://github.com/triton-lang/triton/issues/743, and of 2,048 x 8,192 x 8,192: .../2339
CUBLAS = {"a100-80": 272.7 / 312, "h100": 721.6 / 989.4}
# The kernel that writes the gradient of the similarities, and one before it.
LOSSES = {"contrastive": ("gradient", "statistics"), "sigmoid": ("sigmoid", None)}
L2_BYTES = 6  # of an element: a product is written and read, its gradient is written


def rows() -> Iterator[dict[str, object]]:
    """Yields a row for each card, loss, size and calibration, by the newest machine code's file."""
    path = max(RESULTS.glob("machine-code-*.csv"))
    counted = {(row["kernel"], row["sm"], row["D"]): row for row in read_csv(path)}
    for name, loss, (pairs, width) in itertools.product(CUBLAS, LOSSES, SIZES):
        card = CARDS[name]
        constant = {of: each[card.architecture] for of, each in CONSTANTS.items()}
        product = 2 * pairs**2 * width / card.half / 1e9  # ms at the data sheet's rate
        clock = card.half * 1e12 / (2 * card.multiprocessors * constant["tensor"])
        l2 = constant["l2"] * constant["l2 share"] * card.multiprocessors * clock
        written, before = (
            counted.get((kernel, str(card.architecture), str(width))) for kernel in LOSSES[loss]
        )
        issue = product * float(written["rest issue %"]) / 100 / constant["issue share"]
        elementwise = max(issue, 1e3 * L2_BYTES * pairs**2 / l2)
        for calibration in (CALIBRATION, 1.0):
            shared = 2 * product / CUBLAS[name]
            if before:
                shared += product / float(before["share"]) / calibration
            ours = shared + product / float(written["share"]) / calibration
            chunks = shared + product / CUBLAS[name] + elementwise
            yield {
                "card": name,
                "loss": loss,
                "n": pairs,
                "D": width,
                "calibration": calibration,
                "kernels ms": round(ours, 2),
                "chunks ms": round(chunks, 2),
                "times": round(ours / chunks, 2),
            }
