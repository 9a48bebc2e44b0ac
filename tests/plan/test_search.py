"""simplclip plan: the batches that it finds for a card or this machine."""

import json
import re

import pytest
import torch

from simplclip.common import hardware
from simplclip.plan import search
from simplclip.plan.cards import GIB, parse_memory
from simplclip.plan.count import Usage
from simplclip.plan.search import Budget, largest_micro_batch, search_largest
from simplclip.train import config
from simplclip.train.config import ConfigError
from support.programs import call

pytestmark = pytest.mark.long


CPU = torch.device("cpu")
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build without CUDA"
)


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
    sizes = {"12GB": 12 * GIB, "12000 mb": 12000 << 20, "1.5 gib": 3 * GIB // 2}
    assert {text: parse_memory(text) for text in sizes} == sizes
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
    monkeypatch.setattr(search, "MOST_PAIRS", 4096)
    options = ["--memory", "1200MiB", "--device", "cpu", "--json"]
    for change in ("data.batch_size=64", "data.micro_batch=16", "run.epochs=3"):
        options += ["--set", change]
    result = call("plan", tiny, *options)
    answer = json.loads(result.stdout)
    as_is, one_graph, cached = answer["rows"]
    assert (as_is["batch_size"], as_is["micro_batch"], as_is["fits"]) == (64, 16, True)
    assert sum(as_is["components"].values()) == as_is["peak"]
    for row in (one_graph, cached):
        assert row["peak"] <= answer["usable"]
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
    shown = ("activations", "measured   nothing", "assumed    640 MiB", "chunks of 128 MiB")
    assert all(words in result.stdout for words in shown)


@pytest.mark.slow
def test_the_largest_micro_batch(tiny, monkeypatch):
    """Peaks are made up: 10 bytes a pair that runs at a time, beside 1,000 bytes."""

    def predict(step, device, card):
        predicted.append(step.config.data.images_at_a_time)
        return Usage(peak=1000 + 10 * predicted[-1])

    def machine_with(size):
        budget = Budget(size, context=0, libraries=0, fragmentation=0)
        monkeypatch.setattr(Budget, "of", lambda device: budget)

    predicted = []
    monkeypatch.setattr(search, "predict", predict)
    auto = config.load(tiny, ["data.batch_size=24", "data.micro_batch=auto"])
    assert largest_micro_batch(auto, CPU) is None
    machine_with(1055)
    assert largest_micro_batch(auto, CPU) == 4
    assert len(predicted) <= 7
    assert largest_micro_batch(auto, CPU, ranks=6) is None
    machine_with(1000)
    message = "data.micro_batch: expected one that fits .* even with 1 at a time"
    with pytest.raises(ConfigError, match=message):
        largest_micro_batch(auto, CPU)
