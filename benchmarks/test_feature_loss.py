"""feature_loss against F.normalize and F.mse_loss, plain and compiled: forward and backward, one process.

    pytest benchmarks/test_feature_loss.py --sizes 4096,32768 --repeats 5 --write

Teacher features are float16, as they are stored. Forms take turns within a round; the figure is the median of the rounds.
Extra memory is the allocator's peak above what was live before, the student's gradient included.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import cpu_peak_bytes, interleaved_times, quantiles
from simplclip.ops import feature_loss

WIDTH = 512
INNER = 10  # calls in one timing: a call takes a few milliseconds


def plain(student, teacher):
    return WIDTH * F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher.to(student.dtype), dim=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_feature_loss(benchmark, rows, request, n, dtype):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(n, WIDTH, generator=generator)
    student = (teacher + torch.randn(n, WIDTH, generator=generator)).to(getattr(torch, dtype)).requires_grad_()
    teacher = teacher.half()
    forms = {"simplclip": feature_loss, "F.normalize, F.mse_loss": plain, "torch.compile of it": torch.compile(plain)}

    def step(form):
        student.grad = None
        loss = form(student, teacher)
        loss.backward()
        return float(loss.detach())

    values = {name: step(form) for name, form in forms.items()}
    for name, value in values.items():
        assert value == pytest.approx(values["simplclip"], rel=2e-2 if dtype == "bfloat16" else 1e-4), name

    repeats = request.config.getoption("--repeats")
    cases = {name: lambda form=form: [step(form) for _ in range(INNER)] for name, form in forms.items()}
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats), rounds=1)

    def extra(form):
        student.grad = None
        return cpu_peak_bytes(lambda: form(student, teacher).backward())

    peaks = {name: extra(form) for name, form in forms.items()}
    base = quantiles(times["simplclip"])[1]
    for name in forms:
        p20, p50, p80 = (1e3 / INNER * seconds for seconds in quantiles(times[name]))
        rows.append(
            {
                "op": "feature_loss",
                "n": n,
                "d": WIDTH,
                "dtype": dtype,
                "form": name,
                "repeats": repeats,
                "p20_ms": round(p20, 2),
                "p50_ms": round(p50, 2),
                "p80_ms": round(p80, 2),
                "extra_mib": round(peaks[name] / 2**20, 1),
                "times_ours": round(quantiles(times[name])[1] / base, 2),
                "memory_times_ours": round(peaks[name] / peaks["simplclip"], 1),
            }
        )
        benchmark.extra_info[name] = rows[-1]
