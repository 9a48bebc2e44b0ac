"""benchmarks.cards: kernels of known size, the fit and its constants, and the command line."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cards import chart, cpu
from benchmarks.cards.__main__ import (
    CHART,
    SELECTION,
    columns,
    grouped,
    main,
    parser,
    steps_of,
    summary,
)
from benchmarks.cards.bound import lower_bound
from benchmarks.cards.fit import Measured, fit
from benchmarks.cards.models import kernels
from benchmarks.results_file import RESULTS, ROOT, read_csv
from simplclip.plan import time
from simplclip.plan.cards import CARDS, named
from simplclip.plan.count import Usage
from simplclip.plan.kernels import ExtensionCall, Kernel, Stand, extension_work, kernels_of
from simplclip.plan.time import CLOCK, LAUNCH_MS, step_time
from support.devices import needs_triton

CARD = CARDS["rtx-3090"]
half = torch.float16


def test_the_longest_of_products_bytes_and_launch_counts():
    q = torch.empty(2, 77, 8, 64, device="meta")
    attention = extension_work(ExtensionCall("shaped_attention_bwd", SimpleNamespace(q=q)))
    started = [
        Kernel("torch", "mm", half, "product", 10**12, "product", 3 * 10**6),
        Kernel("torch", "add", torch.float32, bytes=2 * 10**9, times=2),
        Kernel("cuda", "attention", half, *attention),
        Kernel("host", "copy"),
    ]
    rows, total = lower_bound(started, CARD)
    by_bytes = 2 * (2e9 - 2 * (6 << 20)) / CARD.bandwidth / 1e6
    ms = {"mm": 2e12 / CARD.half / 1e9 / CLOCK, "add": by_bytes, "attention": LAUNCH_MS}
    assert {row["kernel"]: row["ms"] for row in rows} == pytest.approx(ms)
    own = next(row for row in rows if row["by"] == "cuda")
    assert own["gflop"] == pytest.approx(5 * 2e-9 * 2 * 8 * 77**2 * 64)
    assert total["predicted_ms"] == pytest.approx(sum(ms.values()), abs=1e-4)
    assert (total["bound"], total["bytes"]) == ("products", 3 * 10**6 + 4 * 10**9)
    counts = {"launches": 4, "own_kernels": 1, "torch_kernels": 3, "host_copies": 1}
    assert counts.items() <= total.items()
    step = step_time(started, CARD)
    assert step.least == pytest.approx(total["predicted_ms"], abs=1e-4)
    assert step.likely > step.least
    assert sum(step.shares.values()) == pytest.approx(1)
    assert (step.launches, step.shares["convolutions"]) == (4, 0)
    assert 0 < step.own < 0.1


def image(*shape: int, last: bool = False, storage: int = 0) -> Stand:
    _, c, h, w = shape
    strides = (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return Stand(half, shape, strides, storage)


@pytest.mark.parametrize(
    ("groups", "taps", "rate", "work"),
    [
        (1, 3, "dense", 2 * 64 * 9 * 16 * 32),
        (1, 1, "pointwise", 2 * 64 * 16 * 32),
        (2, 3, "grouped", 2 * 64 * 2 * 9 * 8 * 16),
        (16, 3, "depthwise", 2 * 64 * 32 * 9),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_convolutions(groups, taps, rate, work, last):
    """Backward has a kernel for the images and one for the weights, each with forward's work."""
    x, y = image(2, 16, 8, 8, last=last), image(2, 32, 8, 8, last=last, storage=1)
    weight = image(32, 16 // groups, taps, taps, storage=2)
    layout = "" if last else " nchw"
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    (kernel,) = kernels_of("convolution", (x, weight, None, *options), {}, [y])
    assert (kernel.rate, kernel.multiply_adds) == (rate + layout, work)
    assert kernel.bytes == x.bytes + y.bytes + weight.bytes
    arguments = (y, x, weight, [32], *options, [True, True, False])
    backward = kernels_of("convolution_backward", arguments, {}, [x, weight])
    assert [(k.rate, k.multiply_adds) for k in backward] == [(f"{rate} backward{layout}", work)] * 2


def test_bytes_of_ops():
    x = image(2, 16, 8, 8)
    y = image(2, 16, 8, 8, storage=1)
    weight = Stand(torch.float32, (16,), (1,), 2)

    def of(*call):
        return [(k.traffic, k.bytes) for k in kernels_of(*call)]

    def statistics(training):
        return x, weight, weight, weight, weight, training, 0.1, 1e-5

    assert of("relu_", (x,), {}, [x]) == [("elementwise", 2 * x.bytes)]
    assert of("mul", (x, x), {}, [y]) == [("elementwise", 2 * x.bytes)]
    assert of("copy_", (y, x), {}, [y]) == [("elementwise", 2 * x.bytes)]
    assert of("clone", (image(2, 16, 8, 8, last=True),), {}, [y]) == [("transposed", 2 * x.bytes)]
    assert of("cudnn_batch_norm", statistics(False), {}, [y]) == [("norm", 2 * x.bytes + 64)]
    assert of("cudnn_batch_norm", statistics(True), {}, [y]) == [("norm", 3 * x.bytes + 64)]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_kernels_of_a_model(layout):
    """ResNet-18 has 1.81 billion multiply-adds an image forward, and backward twice as many, but
    for the images.
    """
    work = {}
    for mode in ("infer", "train"):
        counted = kernels("resnet18", 8, 224, mode, layout)
        work[mode] = sum(k.multiply_adds * k.times for k in counted) / 8 / 1.814e9
        convolutions = {k.rate for k in counted if "convolution" in k.name and k.multiply_adds}
        assert all(("nchw" in rate) == (layout == "nchw") for rate in convolutions - {"stem"})
    assert work["infer"] == pytest.approx(1, abs=0.01)
    assert work["train"] == pytest.approx(3 - 0.118 / 1.814, abs=0.01)


def test_a_fit_finds_the_shares_of_made_steps():
    """Of three kinds of kernels on two cards, from steps of which each has some of all."""
    shares = {"rtx-3090": (0.9, 0.5, 0.8), "rtx-4090": (0.8, 0.4, 0.7)}
    steps = []
    for card, (dense, depthwise, bytes_) in shares.items():
        for a in range(1, 5):
            for b in range(1, 5):
                made = [
                    Kernel("torch", "convolution", half, "dense", a * 10**12, "convolution", 1),
                    Kernel("torch", "convolution", half, "depthwise", b * 10**12, "depthwise", 1),
                    Kernel("torch", "add", half, bytes=(5 - a) * 10**10),
                ]
                parts = [
                    max(time.at_rates(k, CARDS[card])) / share
                    for k, share in zip(made, (dense, depthwise, bytes_))
                ]
                steps.append(Measured(card, "train", "nhwc", "made", 1, 1, sum(parts), made))
    fitted = fit(steps)
    for step in steps:
        assert fitted.ms(step) == pytest.approx(step.ms, rel=0.05)
    assert fitted.rates["dense"][:2] == pytest.approx((0.9, 0.8), abs=0.08)
    slower = [replace(step, ms=2 * step.ms) for step in steps]
    assert math.isclose(fit(slower).ms(slower[0]) / fitted.ms(steps[0]), 2, rel_tol=0.1)


def test_the_constants_are_those_of_the_result_file():
    constants = {
        "rate": time.RATES,
        "traffic": time.TRAFFIC,
        "launch": {"ms": time.LAUNCHES_MS},
        "held out": time.HELD_OUT,
    }
    of_file = {name: {} for name in constants}
    for row in read_csv(max(RESULTS.glob("cards-fit-*.csv"))):
        values = [float(row[card]) if row[card] else None for card in time.FITTED]
        of_file[row["of"]][row["kind"]] = tuple(values)
    assert of_file == constants


def test_the_result_file_and_its_chart():
    """Of the selection, as accurate as is aimed at: on each card, where models check the fit."""
    path = max(RESULTS.glob("cards-2*.csv"))
    rows, selection = read_csv(path), read_csv(SELECTION)
    for row, selected in zip(rows, selection, strict=True):
        assert all(row[name] == selected[name] for name in ("model", "card", "mode", "ms"))
    assert CHART.read_text() == chart.draw(rows, str(path.relative_to(ROOT)))
    numbers = [
        row | {name: float(row[name]) for name in ("ms", "likely_ms", "least_ms")} for row in rows
    ]
    pairs = zip(numbers, selection)
    checks = summary(*columns([row for row, selected in pairs if selected["fitted"] == "no"]))
    assert checks["models"] > 80
    for total in (checks, *grouped(numbers)):
        assert total["below_bound"] <= 0.04
        assert total["median_error"] <= 0.12
        assert total["within_35"] >= 0.85


def test_a_fit_leaves_out_the_models_that_check_it():
    """120 models, of which 25 were drawn after the fit."""
    selected, fitted = (
        steps_of(parser().parse_args(["--file", str(SELECTION), *options]))
        for options in ([], ["--fit"])
    )
    models, of_fit = ({step.model for step in steps} for steps in (selected, fitted))
    assert (len(models), len(of_fit), len(fitted)) == (120, 95, 365)
    checks = {row["model"] for row in read_csv(SELECTION) if row["fitted"] == "no"}
    assert checks == models - of_fit


@pytest.mark.slow
def test_steps_of_a_file(tmp_path, capsys):
    path = tmp_path / "steps.csv"
    rows = ("resnet18,1024,224,100", "resnet18,1024,288,0.001", "vit_tiny_patch16_224,8,224,1")
    path.write_text("\n".join(["model,batch,size,ms", *rows]))
    where = ["--file", str(path), "--mode", "infer", "--layout", "nhwc", "--card", "rtx-3090"]
    main([*where, "--models", "resnet18"])
    total = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (total["models"], total["below_bound"], total["within_35"]) == (2, 0.5, 0.5)
    assert total["median_ratio"] < 1


def test_names_of_cards():
    names = {"RTX 3090": "rtx-3090", "4060 Ti 16GB": "rtx-4060-ti", "3060_12gb": "rtx-3060"}
    names |= {"A6000": "rtx-a6000", "h100": "h100", "rtx-3091": None, "24GiB": None}
    assert {text: named(text) for text in names} == names


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "products"),
    # of the MLP two forward, four backward
    [("sigmoid", 3), ("contrastive", 4), ("mlp-siclip", 6)],
)
def test_products_and_bytes_of_calls(call, products, capsys):
    main(["--call", call, "--n", "4096", "--card", "rtx-4090"])
    first, *_, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("predicted, never measured")
    total = json.loads(last)
    m, n, k = (4928, 2048, 512) if call == "mlp-siclip" else (4096, 4096, 512)
    tflop = products * 2e-12 * m * n * k
    assert total["tflop"] == pytest.approx(tflop, abs=2e-4)
    assert total["predicted_ms"] >= 1e3 * tflop / (CLOCK * 165.2)
    if call != "mlp-siclip":
        # G is written, features are read and have gradients
        assert total["bytes"] > 2 * (n * n + 2 * 2 * n * k)
    assert total["launches"] == total["own_kernels"] + total["torch_kernels"] > 3
    assert total["host_copies"] == 0


def test_a_bound_on_a_cpu():
    """Each kernel takes the longer of its multiply-adds and its bytes."""
    rates = cpu.Rates(multiply_adds=100.0, bandwidth=10.0)
    kernels = [
        Kernel("torch", "mm", multiply_adds=300, bytes=10, times=2),
        Kernel("torch", "add", bytes=50),
    ]
    assert rates.least(Usage(kernels=kernels)) == pytest.approx(2 * 3 + 5)


@pytest.mark.slow
def test_a_step_on_this_cpu(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "PAIRS", 4)
    monkeypatch.setattr(cpu, "REPEATS", 1)
    main(["--cpu", "siclip-tiny"])
    (line,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (line["model"], line["pairs"]) == ("siclip-tiny", 4)
    assert 0 < line["least_ms"] < line["ms"]
