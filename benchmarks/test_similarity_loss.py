"""similarity_loss against open_clip.ClipLoss and a compiled single-product form: forward and backward, one process.

    pytest benchmarks/test_similarity_loss.py --sizes 4096,16384 --repeats 5 --write

Every form gets gradients to both features and to the scale. Forms take turns within a round, so that a change of the
machine's speed meets all of them; the figure is the median of the rounds. Extra memory is the allocator's peak above what
was live before, gradients included. The dense forms run up to N = 16,384 only.
"""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from benchmarks.measure import cpu_peak_bytes, interleaved_times, quantiles
from simplclip.ops import similarity_loss

WIDTH = 512
DENSE_UP_TO = 16384  # open_clip's form takes 17 GiB at 32,768 in float32


def single_product(image, text, scale):
    """The contrastive loss with one matrix product, as torch.compile likes it."""
    logits = scale * (image @ text.T)
    diagonal = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean())


def ours(image, text, scale):
    return similarity_loss(image, text, scale)["contrastive"]


def ours_with_pair_matching(image, text, scale):
    return sum(similarity_loss(image, text, scale, terms=("contrastive", "pair_matching"), plane=(10.0, -2.0)).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_similarity_loss(benchmark, rows, request, n, dtype):
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)
    text = F.normalize(image + 4 * F.normalize(torch.randn(n, WIDTH, generator=generator), dim=1), dim=1)
    leaves = [t.to(getattr(torch, dtype)).requires_grad_() for t in (image, text)] + [torch.tensor(50.0, requires_grad=True)]
    forms = {"simplclip": ours, "simplclip, pair matching too": ours_with_pair_matching}
    if n <= DENSE_UP_TO:
        forms |= {"open_clip.ClipLoss": ClipLoss(), "torch.compile, one product": torch.compile(single_product)}

    def step(form):
        for leaf in leaves:
            leaf.grad = None
        loss = form(*leaves)
        loss.backward()
        return float(loss)

    values = {name: step(form) for name, form in forms.items() if "pair" not in name}
    for name, value in values.items():
        assert value == pytest.approx(values["simplclip"], rel=2e-2 if dtype == "bfloat16" else 1e-4), name

    repeats = request.config.getoption("--repeats")
    cases = {name: lambda form=form: step(form) for name, form in forms.items()}
    times = benchmark.pedantic(interleaved_times, args=(cases, repeats), rounds=1)

    def extra(form):
        for leaf in leaves:
            leaf.grad = None
        return cpu_peak_bytes(lambda: form(*leaves).backward())

    peaks = {name: extra(form) for name, form in forms.items()}
    for name in forms:
        p20, p50, p80 = (1e3 * seconds for seconds in quantiles(times[name]))
        base = 1e3 * quantiles(times["simplclip"])[1]
        rows.append(
            {
                "op": "similarity_loss",
                "n": n,
                "d": WIDTH,
                "dtype": dtype,
                "form": name,
                "repeats": repeats,
                "p20_ms": round(p20, 1),
                "p50_ms": round(p50, 1),
                "p80_ms": round(p80, 1),
                "extra_mib": round(peaks[name] / 2**20, 1),
                "times_ours": round(p50 / base, 2),
                "memory_times_ours": round(peaks[name] / peaks["simplclip"], 1),
            }
        )
        benchmark.extra_info[name] = rows[-1]
