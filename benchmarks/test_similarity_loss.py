"""similarity_loss against open_clip's losses and compiled forms: forward and backward, one process.

    pytest benchmarks/test_similarity_loss.py --sizes 4096,16384 --repeats 5 --write

Every form gets gradients to both features and to the scale. Forms take turns within a round, so that a change of the
machine's speed meets all of them; the figure is the median of the rounds. Extra memory is the allocator's peak above what
was live before, gradients included. `gemms` counts matrix products of N·N·D; `gemm_share` is their time at the rate of
three plain products, measured in the same rounds, over the form's time.
"""

import pytest
import torch

from benchmarks.measure import cpu_peak_bytes, interleaved_times, quantiles
from benchmarks.similarity_forms import OBJECTIVES, batch, forms, three_products

WIDTH = 512
DENSE_UP_TO = {"contrastive": 16384, "all four": 8192}  # where open_clip's form takes 4 GiB and more


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_similarity_loss(benchmark, rows, request, n, dtype, objective):
    features = batch(n, WIDTH, getattr(torch, dtype))
    compared = [form for form in forms(objective, DENSE_UP_TO[objective]) if n <= form.largest]

    values = {form.name: float(features.step(form.run)) for form in compared if "too" not in form.name}
    for name, value in values.items():
        assert value == pytest.approx(values["simplclip"], rel=2e-2 if dtype == "bfloat16" else 1e-4), name

    repeats = request.config.getoption("--repeats")
    cases = {form.name: lambda form=form: features.step(form.run) for form in compared}
    products = three_products(features)
    times = benchmark.pedantic(interleaved_times, args=({"products": products, **cases}, repeats), rounds=1)
    one_product = quantiles(times["products"])[1] / 3

    def extra(form):
        for leaf in features.leaves():
            leaf.grad = None
        return cpu_peak_bytes(lambda: form.run(features).backward())

    peaks = {form.name: extra(form) for form in compared}
    for form in compared:
        p20, p50, p80 = quantiles(times[form.name])
        gemms = form.products(features)
        rows.append(
            {
                "op": "similarity_loss",
                "objective": objective,
                "n": n,
                "d": WIDTH,
                "dtype": dtype,
                "form": form.name,
                "repeats": repeats,
                "p20_ms": round(1e3 * p20, 1),
                "p50_ms": round(1e3 * p50, 1),
                "p80_ms": round(1e3 * p80, 1),
                "times_ours": round(p50 / quantiles(times["simplclip"])[1], 2),
                "gemms": round(gemms, 2),
                "gemm_share": round(gemms * one_product / p50, 2),
                "extra_mib": round(peaks[form.name] / 2**20, 1),
                "memory_times_ours": round(peaks[form.name] / peaks["simplclip"], 1),
            }
        )
        benchmark.extra_info[form.name] = rows[-1]
