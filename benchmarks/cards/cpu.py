"""A lower bound of a training step on this CPU, from its rates of products and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simplclip.plan import actual
from simplclip.plan.count import Usage
from simplclip.plan.measure import predict
from simplclip.plan.step import TrainerStep
from simplclip.train import config

CPU = torch.device("cpu")
PAIRS, REPEATS = 64, 5
PRODUCT, COPY = 1536, 1 << 26  # sides of a product, bytes of a copy


@dataclass(frozen=True)
class Rates:
    """What one thread reaches."""

    multiply_adds: float  # a second, in float32
    bandwidth: float  # bytes a second, read and written

    @classmethod
    def measured(cls) -> Rates:
        a, b = torch.randn(2, PRODUCT, PRODUCT)
        product = min(_seconds(lambda: a @ b) for _ in range(2 * REPEATS))
        source, target = torch.zeros(2, COPY // 4)
        copy = min(_seconds(lambda: target.copy_(source)) for _ in range(2 * REPEATS))
        return cls(PRODUCT**3 / product, 2 * COPY / copy)

    def least(self, usage: Usage) -> float:
        """Returns the seconds of the kernels, each the longer of its multiply-adds and its
        bytes.
        """
        times = (
            (k.times, k.multiply_adds / self.multiply_adds, k.bytes / self.bandwidth)
            for k in usage.kernels
        )
        return sum(count * max(products, moved) for count, products, moved in times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(name: str, rates: Rates) -> dict[str, object]:
    """Returns the bound of a step of a model, and its processor time on one thread in float32."""
    values = {
        "model": {"name": name},
        "data": {"train": "none/*.tar", "batch_size": PAIRS},
        "run": {"out": "runs/none"},
    }
    step = TrainerStep(config.from_dict(values), "fp32")
    least = rates.least(predict(step, CPU))
    run = actual.runner(step, CPU)
    run()
    measured = statistics.median(_seconds(run) for _ in range(REPEATS))
    return {
        "model": name,
        "pairs": PAIRS,
        "least_ms": round(1e3 * least),
        "ms": round(1e3 * measured),
        "share": round(least / measured, 3),
    }


def run(names: list[str]) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    rates = Rates.measured()
    print(
        f"one thread: {2e-9 * rates.multiply_adds:,.0f} GFLOP/s of products, "
        f"{1e-9 * rates.bandwidth:.1f} GB/s of copies"
    )
    return [compare(name, rates) for name in names]
