"""Gradient caching on siclip-tiny: time and memory against plain accumulation, and memory against one graph.

    OMP_NUM_THREADS=1 pytest benchmarks/test_gradient_cache.py --repeats 5 --write

Accumulation runs the same micro-batches, each with a loss of its own, so that the negatives of a pair are in its micro-batch.
One graph, whose gradients gradient caching computes, is measured at a smaller batch. No optimizer.
"""

import pytest
import torch

from benchmarks.measure import PASSES, compare, peak_mib
from benchmarks.training_forms import PRECISION
from simplclip import gradient_cache, models
from simplclip.common import hardware
from simplclip.losses import ClipPMLoss

MICRO, TIMED, PEAK = 64, 2048, 1024
OURS, ACCUMULATION, GRAPH = "gradient caching", "accumulation, a loss for each micro-batch", "one graph"


class Case:
    """siclip-tiny, a loss, and pairs in micro-batches."""

    def __init__(self, pairs: int, dtype: str):
        torch.manual_seed(0)
        self.model, self.loss = models.create("siclip-tiny").train(), ClipPMLoss()
        image, text = torch.rand(pairs, 3, 48, 48), torch.randint(1, 8000, (pairs, 16))
        self.micro_batches = list(zip(image.split(MICRO), text.split(MICRO)))
        self.autocast = lambda: hardware.autocast(PRECISION[dtype], torch.device("cpu"))

    def encode(self, batch):
        image, text = batch
        return self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True)

    def of(self, image, text):
        return self.loss(image, text, self.model.logit_scale.exp())

    def cached(self) -> None:
        with self.autocast():
            gradient_cache.backward(self.encode, self.micro_batches, self.of, model=self.model)

    def accumulated(self) -> None:
        for batch in self.micro_batches:
            with self.autocast():
                loss = self.of(*self.encode(batch))
            loss.backward()

    def one_graph(self) -> None:
        with self.autocast():
            features = zip(*map(self.encode, self.micro_batches))
            loss = self.of(*map(torch.cat, features))
        loss.backward()


def measure(dtype, repeats):
    what = {"op": "gradient_cache", "shape": f"siclip-tiny, m={MICRO}", "dtype": dtype, "pass": PASSES[True]}
    timed = Case(TIMED, dtype)
    rows = compare(what | {"n": TIMED}, {OURS: timed.cached, ACCUMULATION: timed.accumulated}, repeats, base=OURS, warmup=0)
    case = Case(PEAK, dtype)
    for form, run in {OURS: case.cached, ACCUMULATION: case.accumulated, GRAPH: case.one_graph}.items():
        run()  # so that gradients exist
        rows.append(what | {"n": PEAK, "form": form, "extra_mib": round(peak_mib(run))})
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_cache(measured, dtype):
    measured(measure, dtype)
