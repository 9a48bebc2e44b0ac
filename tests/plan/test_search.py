"""simplclip plan: the batches that it finds for a card or this machine."""

import json
import re
from unittest import mock

import pytest
import torch

from simplclip.common import hardware
from simplclip.plan import measure, search
from simplclip.plan.cards import GIB, parse_memory
from simplclip.plan.search import Budget, largest_micro_batch, search_largest
from simplclip.plan.step import TrainerStep
from simplclip.train import config
from simplclip.train.config import ConfigError
from support.programs import call

pytestmark = pytest.mark.long


CPU = torch.device("cpu")
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build without CUDA"
)


def predict(name, *changes, precision="fp32"):
    step = TrainerStep(config.load(name, changes), precision, teacher_width=256)
    return measure.predict(step, CPU)


@pytest.mark.parametrize(
    ("peak", "limit", "most", "peaks"),
    [
        (lambda n: 3 * n + 100, 1000, 300, 4),
        (lambda n: 1000 * n + 5, 10**7 + 3, 9999, 4),
        (lambda n: 7 * n, 6, 0, 4),
        (lambda n: 100 * n + 5000 * (n // 7), 123_456, 153, 10),
        (lambda n: 10**9 + n // 100, 10**9 + 50, 5099, 30),
        (lambda n: 10**6 - n % 3, 10**6, 1 << 20, 30),
    ],
)
def test_the_largest_batch(monkeypatch, peak, limit, most, peaks):
    """Few peaks are computed.

    Within a share of 0 the answer is exact, else near it, and known to fit.
    """
    sizes = range(1, (1 << 20) + 1)
    with monkeypatch.context() as patch:
        patch.setattr(search, "WITHIN", 0)
        assert search_largest(peak, limit, sizes, start=8)[0] == most
    size, seen = search_largest(peak, limit, sizes, start=8)
    assert most / 1.05 - 1 <= size <= most
    assert not size or seen[size] <= limit
    assert len(seen) <= peaks
    divisors = [1, 2, 3, 100, 5000]
    assert search_largest(peak, limit, divisors, start=50)[0] == max(
        (n for n in divisors if n <= most), default=0
    )
    assert search_largest(peak, limit, [], start=8) == (0, {})


def test_memory_of_cards():
    assert {parse_memory(name) for name in ("24GiB", "RTX 3090", "rtx-4090", "3090")} == {24 * GIB}
    assert (parse_memory("12GB"), parse_memory("12000 mb"), parse_memory("1.5 gib")) == (
        12 * GIB,
        12000 << 20,
        3 * GIB // 2,
    )
    assert 0.8 * 24 * GIB < Budget(24 * GIB).usable < 24 * GIB - Budget(24 * GIB).context
    assert 0 < Budget.of(CPU).usable < Budget.of(CPU).memory


def test_memory_of_a_container(tmp_path, monkeypatch):
    """Its limit counts, not the memory of the machine; "max" is no limit."""
    files = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(hardware, "LIMITS", files)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    machine = hardware.total_memory(CPU)
    for text, expected in (("max\n", machine), (f"{2**63 - 4096}\n", machine), ("65536\n", 65536)):
        files[1].write_text(text)
        assert hardware.total_memory(CPU) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.total_memory(CPU) == 16384


@pytest.mark.slow
def test_batches_that_fit(tiny, monkeypatch):
    """Of a run of epochs, whose data is elsewhere."""
    monkeypatch.setattr(search, "WITHIN", 0.5)  # fewer predictions
    changes = (
        "--set",
        "data.batch_size=64",
        "--set",
        "data.micro_batch=16",
        "--set",
        "run.epochs=3",
    )
    result = call("plan", tiny, "--memory", "1200MiB", *changes, "--device", "cpu", "--json")
    answer = json.loads(result.stdout)
    as_is, one_graph, cached = answer["rows"]
    assert (as_is["batch_size"], as_is["micro_batch"], as_is["fits"]) == (64, 16, True)
    assert sum(as_is["components"].values()) == as_is["peak"]
    assert (
        as_is["peak"]
        == predict(
            tiny, "data.batch_size=64", "data.micro_batch=16", precision=answer["precision"]
        ).peak
    )
    for row in (one_graph, cached):
        assert row["peak"] <= answer["usable"]
    larger = f"data.batch_size={int((1 + search.WITHIN) * one_graph['batch_size']) + 1}"
    assert predict(tiny, larger, precision=answer["precision"]).peak > answer["usable"]
    assert cached["batch_size"] > 4 * one_graph["batch_size"]
    assert len(re.findall("pairs take", result.stderr)) <= 12  # predictions


@pytest.mark.slow
@pytest.mark.prove
@needs_cuda_build
def test_a_step_that_does_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(search, "WITHIN", 1.0)  # fewer predictions
    result = call("plan", tiny, "--memory", "1GiB", "--set", "data.batch_size=512")
    assert re.search(r"as configured +512 +all +0\.\d+ .* no\n", result.stdout)
    assert re.search(r"largest by gradient caching .* yes\n", result.stdout)
    for words in (
        "activations",
        "measured   nothing",
        "assumed    640 MiB",
        "in the loss, chunks of 128 MiB",
    ):
        assert words in result.stdout


@pytest.mark.slow
def test_the_largest_micro_batch(tiny, monkeypatch):
    def machine_with(size):
        budget = Budget(size, context=0, libraries=0, fragmentation=0)
        monkeypatch.setattr(Budget, "of", lambda device: budget)

    auto = config.load(
        tiny, ["data.batch_size=24", "data.micro_batch=auto", "run.precision=fp32", "optim.ema=0.9"]
    )
    usages = {
        micro: predict(tiny, "data.batch_size=24", f"data.micro_batch={micro}", "optim.ema=0.9")
        for micro in (4, 6)
    }
    assert largest_micro_batch(auto, CPU) is None
    predicted = mock.Mock(side_effect=measure.predict)
    monkeypatch.setattr(search, "predict", predicted)
    machine_with(sum(usage.peak for usage in usages.values()) // 2)
    assert largest_micro_batch(auto, CPU) == 4
    assert predicted.call_count <= 6
    assert largest_micro_batch(auto, CPU, ranks=6) is None
    machine_with(1 << 20)
    predicted.side_effect = lambda *_: usages[4]
    with pytest.raises(
        ConfigError, match="data.micro_batch: expected one that fits .* even with 1 at a time"
    ):
        largest_micro_batch(auto, CPU)
