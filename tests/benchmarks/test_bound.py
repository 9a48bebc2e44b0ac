"""benchmarks.bound: the work of kernels of known size, and the command line."""

import json
from types import SimpleNamespace

import pytest
import torch
from devices import needs_triton

from benchmarks.bound.__main__ import main
from benchmarks.bound.cards import CARDS
from benchmarks.bound.roofline import LAUNCH_MS, roofline
from benchmarks.bound.trace import ExtensionCall, Step

CARD = CARDS["rtx-3090"]


def test_the_longest_of_products_bytes_and_launch_counts():
    """Three kernels, each bound by another of the three, and a copy from the host."""
    q = torch.empty(2, 77, 8, 64, device="meta")
    steps = [
        Step("torch", "mm", torch.bfloat16, 10**12, [(0, 10**6), (1, 10**6)], written=[(2, 10**6)]),
        Step("torch", "add", torch.float32, read=[(0, 10**9)], written=[(1, 10**9)]),
        Step("cuda", "attention", torch.bfloat16, launch=ExtensionCall("shaped_attention_bwd", SimpleNamespace(q=q))),
        Step("host", "copy"),
    ]
    rows, total = roofline(steps, CARD)
    ms = [2e12 / CARD.half / 1e9, 2e9 / CARD.bandwidth / 1e6, LAUNCH_MS]
    assert {row["kernel"]: row["ms"] for row in rows} == pytest.approx(dict(zip(("mm", "add", "attention"), ms)))
    assert next(row["gflop"] for row in rows if row["by"] == "cuda") == pytest.approx(5 * 2e-9 * 2 * 8 * 77**2 * 64)
    assert total["predicted_ms"] == pytest.approx(sum(ms), abs=1e-4)
    assert (total["bound"], total["bytes"]) == ("products", 3 * 10**6 + 2 * 10**9)
    assert (total["launches"], total["own_kernels"], total["torch_kernels"], total["host_copies"]) == (3, 1, 2, 1)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "products"),
    [("sigmoid", 3), ("contrastive", 4), ("mlp-siclip", 6)],  # of the MLP two forward, four backward
)
def test_products_and_bytes_of_calls(call, products, capsys):
    main(["--call", call, "--n", "4096", "--card", "rtx-4090"])
    first, *_, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("predicted, never measured")
    total = json.loads(last)
    m, n, k = (4928, 2048, 512) if call == "mlp-siclip" else (4096, 4096, 512)
    tflop = products * 2e-12 * m * n * k
    assert total["tflop"] == pytest.approx(tflop, abs=2e-4)
    assert total["predicted_ms"] >= 1e3 * tflop / 165.2
    if call != "mlp-siclip":
        assert total["bytes"] > 2 * (n * n + 2 * 2 * n * k)  # G is written, features are read and have gradients
    assert total["launches"] == total["own_kernels"] + total["torch_kernels"] > 3
    assert total["host_copies"] == 0
