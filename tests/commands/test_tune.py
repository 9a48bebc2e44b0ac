"""`simplclip tune` chooses what is faster here by more than the noise, and the ops read the choices."""

import json
import re
import time
from unittest import mock

import pytest
import torch
from devices import needs_cpu_kernels
from test_cli import call

from simplclip import ops, tune
from simplclip.commands.doctor import render, report
from simplclip.common import machine, tuned
from simplclip.kernels import tuning
from simplclip.ops import backends
from simplclip.ops.mlp import op as mlp
from simplclip.ops.similarity import chunks

pytestmark = needs_cpu_kernels
TINY = tune.Sizes(((2, 9, 2, 16, False), (2, 70, 2, 16, True)), ((200, 16, 64),), (70, 130), 16, (torch.float32,))
SHORT, LONG = (backends.choice_of("shaped_attention_fwd", torch.float32, length) for length in (9, 70))


@pytest.fixture(autouse=True)
def quick(monkeypatch, cache):
    """Makes samples short, and forgets all findings."""
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 0.001)


def stored(**choices):
    tune.store("cpu", {"date": "2026-01-02", "choices": choices, "measured": []})


@pytest.fixture
def ran(monkeypatch):
    """Yields a list of ops and the backends that ran them."""
    seen, select = [], backends.select
    monkeypatch.setattr(
        backends,
        "select",
        lambda op, *rest, **call: seen.append((op, select(op, *rest, **call)[0])) or select(op, *rest, **call),
    )
    return seen


def attention(q, **options):
    return ops.shaped_attention(q, q, q, *torch.ones(3, 2).unbind(), **options).sum()


def attend(length, **options):
    attention(torch.randn(2, length, 2, 16, requires_grad=True), **options).backward()


def slowed(function):
    def slow(*args):
        time.sleep(0.02)
        return function(*args)

    return slow


def slow(op, name):
    """Returns a context in which a backend takes longer."""
    spoiled = backends.Implementation(slowed(backends.TABLE[op][name].function), backends.TABLE[op][name].why_not)
    return mock.patch.dict(backends.TABLE[op], {name: spoiled})


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["cpu", "sdpa"])
def test_what_is_slow_is_not_taken(spoiled, ran):
    with slow("shaped_attention_fwd", spoiled):
        found = tune.tune("cpu", TINY)
    other = {"cpu": "sdpa", "sdpa": "cpu"}[spoiled]
    chosen = {row["choice"]: row["chosen"] for row in found["measured"]}
    assert chosen[SHORT] == chosen[LONG] == other
    assert found["choices"].get(SHORT, "cpu") == other
    ran.clear()
    for length in (9, 70):
        attend(length)
    assert [name for _, name in ran] == [other] * 4  # forward and backward
    assert {row["choice"] for row in found["measured"]} == {
        SHORT, LONG, backends.choice_of("parallel_mlp_fwd", torch.float32),
        *(tuned.name_of(what, torch.float32) for what in (mlp.HIDDEN, chunks.SCRATCH, chunks.STORE)),
    }  # fmt: skip


def test_a_candidate_that_is_wrong_or_fails_is_left_out(monkeypatch):
    choice = next(tune.of_sizes(TINY, "cpu"))
    assert (choice.name, choice.candidates) == (SHORT, ["cpu", "sdpa"])
    row = backends.TABLE["shaped_attention_fwd"]

    def put(function):
        monkeypatch.setitem(row, "sdpa", backends.Implementation(function, row["sdpa"].why_not))

    right = row["sdpa"].function
    with slow("shaped_attention_fwd", "cpu"):
        put(lambda call: (1.1 * right(call)[0], *right(call)[1:]))
        found = tune.decide(choice, "cpu", {})
        assert found["chosen"] == "cpu"
        assert found["candidates"]["sdpa"].startswith("differs from the default by ")
        put(lambda call: 1 / 0)
        found = tune.decide(choice, "cpu", {})
        assert (found["chosen"], found["candidates"]["sdpa"]) == ("cpu", "division by zero")
        put(right)
        assert tune.decide(choice, "cpu", {})["chosen"] == "sdpa"


ALIKE = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.95]


@pytest.mark.parametrize(
    ("of_calls", "taken"),
    [
        ([[0.9 * t for t in ALIKE]], True),
        ([[0.98 * t for t in ALIKE]], False),  # less than MARGIN
        ([[0.6 * t for t in ALIKE[:5]] + [1.3 * t for t in ALIKE[5:]]], False),  # not faster in all repeats but one
        ([[0.6 * t for t in ALIKE[:6]] + [1.3 * t for t in ALIKE[6:]]], True),
        ([[0.5 * t for t in ALIKE], [1.1 * t for t in ALIKE]], False),  # slower at a size
        ([[0.5 * t for t in ALIKE], [1.01 * t for t in ALIKE]], True),
    ],
)
def test_noise_keeps_the_default(of_calls, taken):
    times = {"default": [ALIKE for _ in of_calls], "other": of_calls}
    assert tune.fastest(times, "default") == ("other" if taken else "default")
    assert tune.fastest({**times, "best": [[0.4 * t for t in ALIKE] for _ in of_calls]}, "default") == "best"


def test_the_default_has_both_ends_of_a_turn(monkeypatch):
    order, seconds = [], iter([1, 5, 4, 3, 5, 4, 6])
    monkeypatch.setattr(tune, "_seconds", lambda *_: order.append(tuned.choices("cpu").get("x")) or next(seconds))
    times = tune._times(tune.Choice("x", ["a", "b"], [("", attend)]), ["a", "b"], "cpu", {}, 2)
    assert order == [None, "a", "b", "a", "a", "b", "a"]
    assert times == {"a": [[3, 5]], "b": [[4, 4]]}


def test_the_ops_read_what_was_chosen(ran):
    stored(**{LONG: "sdpa", backends.choice_of("parallel_mlp_fwd", torch.bfloat16): "reference"})
    attend(70)
    attend(64)
    attend(129)
    attend(70, lengths=torch.tensor([70, 3]))  # calls with lengths are not measured
    with backends.backend("cpu"):
        attend(70)
    assert [name for _, name in ran[::2]] == ["sdpa", "cpu", "cpu", "cpu", "cpu"]
    assert [name for _, name in ran[::2]] == [name for _, name in ran[1::2]]
    ran.clear()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(3, 4, dtype=dtype)
        ops.parallel_mlp(x, x.T @ x, None, x.T @ x, None)
    assert [name for _, name in ran] == ["reference", "cpu"]


def test_the_ops_read_how_many_bytes_were_chosen():
    names = {what: tuned.name_of(what, torch.float32) for what in (mlp.HIDDEN, chunks.SCRATCH, chunks.STORE)}
    stored(**{names[mlp.HIDDEN]: 4 * 128 * 16, names[chunks.SCRATCH]: 1 << 20, names[chunks.STORE]: 1 << 10})
    x, weight, out = torch.ones(300, 8), torch.ones(16, 8), torch.ones(300, 8)
    assert [len(some) for some, _ in mlp.hidden_rows(x, weight, None, out)] == [128, 128, 44]
    assert chunks.budgets("cpu", torch.float32, None, None) == (1 << 20, 1 << 10)
    assert chunks.budgets("cpu", torch.float32, 5, 6) == (5, 6)
    assert chunks.budgets("cpu", torch.bfloat16, None, 0) == (chunks.SCRATCH_BYTES, 0)


def test_only_a_tile_that_the_gates_admit_is_taken():
    default, second = tuning.candidates("similarity_forward", 1, "half", 86).values()
    name = tuning.choice_of("similarity_forward", 1, "half", 86)
    for chosen, expected in (("128x64x32/8/4", second), ("256x256x32/8/4", default)):
        with tuned.trial("cuda", {name: chosen}):
            assert tuning.lookup("similarity_forward", 1, "half", 86) == expected
            assert tuning.lookup("similarity_forward", 1, "half", 89) == default
    assert tuning.lookup("similarity_forward", 1, "half", 86) == default


def shapes(mode=None):
    q = torch.empty(2, 9, 2, 16)
    with mode or torch.no_grad():
        q = torch.empty(2, 9, 2, 16)
        call = (q, q, q, torch.ones(3, 2), None, 0.25, False)
        return [t.shape for t in torch.ops.simplclip.shaped_attention_fwd(*call, "")]


@pytest.mark.slow
def test_fake_tensors_and_compiled_graphs_know_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept, keys = [], []
    for name in ("cpu", "sdpa"):
        stored(**{SHORT: name})
        assert shapes(FakeTensorMode()) == shapes()
        kept.append(shapes()[2])
        keys.append(torch.compiler.config.cache_key_tag)
    assert len(set(kept)) == len(set(keys)) == 2
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 40, 70):  # sdpa is chosen up to 64 tokens
        compiled(torch.randn(2, length, 2, 16, requires_grad=True)).backward()


def test_compiled_graphs_of_another_build_are_not_taken(monkeypatch):
    keys = set()
    for build in ("one", "other"):
        monkeypatch.setattr(machine, "_build", lambda build=build: build)
        machine.forget()
        shapes()
        keys.add(torch.compiler.config.cache_key_tag)
    assert len(keys) == 2


def test_the_command(monkeypatch):
    assert call("tune", "--device", "cpu", "--show").stdout == "cpu: not tuned: simplclip tune\n"
    assert "cpu not tuned: simplclip tune" in render(report())
    monkeypatch.setattr(tune, "standard", lambda device: TINY)
    with slow("shaped_attention_fwd", "cpu"):
        made = call("tune", "--device", "cpu").stdout
    assert re.search(r"shaped_attention.* cpu +sdpa +cpu [\d.]+", made)
    assert "16 MiB" in made
    assert call("tune", "--device", "cpu", "--show").stdout == made
    date = machine.known("tuned", "cpu")["date"]
    assert f"cpu {date}" in render(report())
    assert call("tune", "--device", "cpu", "--reset").stdout == "cpu: the defaults are in force\n"
    assert machine.known("tuned", "cpu") == {}
    assert "sdpa" not in json.dumps([json.loads(path.read_text()) for path in machine.folder().glob("*.json")])
    assert call("tune", "--set", "data.batch_size=8").exit_code == 2


def test_sizes_of_a_config():
    from simplclip.train import config

    sizes = tune.sizes_of(config.load("siclip-tiny-emoji", ["run.precision=bf16", "data.batch_size=8"]), "cpu")
    assert sizes == tune.Sizes(
        ((8, 16, 8, 32, True), (8, 36, 8, 32, False)),
        ((8 * 16, 256, 1024), (8 * 36, 256, 1024)),
        (8,),
        256,
        (torch.bfloat16,),
    )
