"""simplclip plan: memory against measured steps, what counts, the largest batches, the command."""

import json
import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from simplclip.commands.plan import parse_card
from simplclip.commands.train import predict_micro_batch
from simplclip.common import hardware
from simplclip.plan import step as plans
from simplclip.plan.cards import CARDS, GIB, RATES, Work, step_ms
from simplclip.plan.meter import fake_device
from simplclip.plan.step import Step
from simplclip.train import config, setup
from simplclip.train import step as steps
from simplclip.train.config import ConfigError
from support.devices import cpu_peak_bytes
from support.programs import call
from support.train.states import random_batches, random_state

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
CARD = CARDS["rtx-3090"]
MEMORY = 24 * GIB
WIKD = ["loss.feature_weight=1", "loss.relational_weight=1", "loss.interactive_weight=1"]


def row(tiny, *changes, pairs=96, micro=None):
    return Step(config.load(tiny, changes), "bf16").row(pairs, micro, MEMORY)


def ms(row):
    return step_ms(row.works, "rtx-3090")


CASES = {
    "one graph": [],
    "averages": ["optim.ema=0.99"],
    "Lion, a frozen tower": ["optim.name=lion", "optim.lr_scale={visual: 0}"],
    "recomputed": ["model.grad_checkpointing=true", "model.options.text_cfg.layers=3"],
    "cached": ["data.micro_batch=16", "data.batch_size=192"],
    "sigmoid, cached": ["loss.base=sigmoid", "data.micro_batch=32", "data.batch_size=192"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_of_a_measured_step(tiny, case):
    """On a CPU, where other kernels run: to a tenth."""
    values = config.load(tiny, CASES[case])
    pairs, micro = values.data.batch_size, values.data.micro_batch
    predicted = Step(values, "fp32", torch.device("cpu")).row(pairs, micro, MEMORY)
    state = random_state(values)
    batches = random_batches(state)
    steps.keep_frozen(state)
    steps.train_step(state, batches)  # makes the optimizer's state
    tensors = [*state.model.parameters(), *state.model.buffers(), state.optimizer.state]
    tensors += [state.ema.averages if state.ema else []]
    sizes = {}
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    before = sum(sizes.values())
    measured = before + cpu_peak_bytes(lambda: steps.train_step(state, batches))
    assert predicted.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 32])
def test_memory_of_forward_and_backward(tiny, micro):
    """The trainer's own steps, with backward, on fake tensors of a CPU: to 2 %."""
    values = config.load(tiny, ["model={name: 'open_clip:ViT-B-32'}", "data.batch_size=128"])
    values = values.replaced(data={"micro_batch": micro})
    cpu = torch.device("cpu")
    predicted = Step(values, "bf16", cpu).row(128, micro, MEMORY)
    with torch.device("meta"):
        prepared = setup.prepare_model(*setup.shapes_of(values), [], values, cpu)
    prepared.crop.undo()
    prepared.crop = None
    size = micro or 128
    with fake_device([prepared.model], cpu) as meter, meter:
        state = setup.make_state(values, cpu, "bf16", prepared=prepared)
        batch = {
            "image": torch.empty(size, 3, 224, 224, dtype=torch.uint8),
            "text": torch.zeros(size, 1, 77).long(),
            "group": torch.arange(size),
        }
        inputs = sum(tensor.nbytes for tensor in batch.values())
        batches = [batch] * (128 // size)
        steps.train_step(state, batches)  # makes the optimizer's state
        meter.peak = 0
        steps.train_step(state, batches)
    assert predicted.peak == pytest.approx(meter.peak - inputs, rel=0.02)


@pytest.mark.slow
def test_two_passes_give_the_line_through_every_size(tiny):
    """Of captions, a teacher and all terms; the optimizer's moments count."""
    changes = [*WIKD, "loss.pm_weight=1", "data.captions_per_image=2", "data.mean_tokens=5"]
    values = config.load(tiny, changes)
    step = Step(values, "bf16")
    rows = {pairs: step.row(pairs, None, MEMORY) for pairs in (128, 300, 512, 2048)}
    slope = (rows[512].peak - rows[128].peak) / 384
    assert rows[2048].peak == pytest.approx(rows[512].peak + 1536 * slope, rel=0.02)
    assert rows[300].peak == pytest.approx(rows[128].peak + 172 * slope, rel=0.02)
    weights = sum(
        p.nbytes for p in setup.shapes_of(values.replaced(run={"steps": 9}))[0].parameters()
    )
    assert rows[128].peak > 3 * weights + 128 * slope


@pytest.mark.slow
def test_what_a_step_saves(tiny):
    """Shorter texts, recomputing, one caption, adapters and frozen towers take less."""
    plain = row(tiny, "data.captions_per_image=2")
    for change in (
        "data.mean_tokens=3",
        "model.grad_checkpointing=true",
        "data.captions_per_image=1",
    ):
        less = row(tiny, "data.captions_per_image=2", change)
        assert less.peak < 0.99 * plain.peak, change
    model = "model={name: 'open_clip:ViT-B-32'}"
    plain = row(tiny, model)
    frozen = row(tiny, model, "optim.lr_scale={visual: 0}")
    lora = row(tiny, model, "model.lora={rank: 8}")
    assert max(lora.peak, frozen.peak) < plain.peak
    assert ms(frozen) < 0.8 * ms(plain)
    checkpointed = row(tiny, model, "model.grad_checkpointing=true")
    assert checkpointed.peak < 0.5 * plain.peak
    assert 1.15 < ms(checkpointed) / ms(plain) < 1.4  # forward runs twice


@pytest.mark.slow
def test_gradient_caching(tiny):
    """All but the last micro-batch are encoded twice; a forward is a third of the work."""
    one, cached = row(tiny, pairs=2048), row(tiny, pairs=16384, micro=2048)
    assert 1.15 < ms(cached) / (8 * ms(one)) < 1.4
    assert one.peak < cached.peak < 2 * one.peak
    huge = row(tiny, pairs=65536, micro=2048)  # the loss takes more
    assert ms(huge) > 4.2 * ms(cached)


@pytest.mark.slow
def test_outputs_of_frozen_parts_are_kept(tiny):
    values = {
        "model": {"name": "siclip-lite0", "freeze_norms": True},
        "inherit": {"source": ["efficientnet-lite0", "minilm"]},
        "data": {"train": "nowhere/*.tar", "batch_size": 40, "micro_batch": 4},
        "run": {"out": "runs/none", "steps": 10},
    }
    step = Step(config.from_dict(values), "bf16")
    kept, not_kept = (step.row(4096, 64, memory) for memory in (MEMORY, 0))
    assert kept.peak > not_kept.peak
    assert ms(kept) < ms(not_kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RN50", "MobileCLIP2-S0", "ViT-B-16-SigLIP"])
def test_plain_models(tiny, name):
    base = ["loss.base=sigmoid"] if "SigLIP" in name else []
    one, two = (
        row(tiny, f"model={{name: 'open_clip:{name}'}}", *base, pairs=pairs) for pairs in (32, 64)
    )
    assert 1.2 < two.peak / one.peak < 2
    assert 1.6 < ms(two) / ms(one) < 2


def test_terms_that_come_later_count(tiny):
    now = row(tiny, *WIKD, "loss.pm_weight=1")
    later = row(
        tiny,
        *WIKD,
        "loss.relational_weight={value: 0, to: 1, start: 10}",
        "loss.pm_weight={value: 1, until: 30}",
    )
    assert later == now


@pytest.mark.slow
def test_the_largest_batches(tiny):
    step = Step(config.load(tiny), "bf16")
    for micro in (None, 64):
        found = step.largest(2 * GIB, micro)
        assert found.fits
        assert found.peak <= plans.usable(2 * GIB)
        more = found.batch_size + max(micro or 1, found.batch_size // 40)
        more = more // (micro or 1) * (micro or 1)
        assert found.batch_size >= 65000 or not step.row(more, micro, 2 * GIB).fits
    assert step.largest(1 * GIB).batch_size < found.batch_size
    assert step.largest(860 << 20) is None
    half = step.row(4096, 2048, 0).peak
    memory = int((half + 1000) / (1 - plans.FRAGMENTATION)) + plans.LIBRARIES
    assert step.fitting(4096, memory).micro_batch == 2048
    assert step.fitting(96, memory).micro_batch is None
    checkpointed = step.row(4096, None, 0, checkpointed=True).peak
    memory = int((checkpointed + 1000) / (1 - plans.FRAGMENTATION)) + plans.LIBRARIES
    row = step.fitting(4096, memory)
    assert (row.micro_batch, row.checkpointed) == (None, True)
    with pytest.raises(ConfigError, match="data.batch_size: expected one that fits 0.06 GiB"):
        step.fitting(4096, 860 << 20)


def test_the_largest_micro_batch_of_this_machine(tiny, monkeypatch):
    auto = config.load(tiny, ["data.batch_size=4096", "data.micro_batch=auto"])
    monkeypatch.setattr(hardware, "total_memory", lambda device: 3 * GIB)
    assert 4096 % predict_micro_batch(auto).data.micro_batch == 0
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert predict_micro_batch(auto).data.micro_batch is None


@pytest.mark.parametrize(("card", "precision"), [("rtx-3090", "bf16"), ("t4", "fp32")])
def test_the_command(tiny, card, precision):
    result = call("plan", tiny, "--card", card, "--set", "data.micro_batch=48")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"siclip-tiny, {precision}, 96 pairs"
    for form in ("plain +all", "checkpointed +all", "cached +48", "checkpointed, cached +48"):
        assert re.search(rf"\n{form} +[\d.]+  yes( +[\d,]+){{3}}", result.stdout), form
    assert "paste    --set data.batch_size=96 --set data.micro_batch=null" in lines
    assert re.search(r"fastest  plain, [\d,]+ images/s; 50 steps: 0.0 hours", result.stdout)


@pytest.mark.slow
def test_the_command_as_json():
    words = ["data.batch_size=600", "run.epochs=3", "data.samples=12400000"]
    options = [option for word in words for option in ("--set", word)]
    result = call("plan", "open_clip:ViT-B-32", "--card", "RTX 3090", "--json", *options)
    planned = json.loads(result.stdout)
    plain, checkpointed, cached, both = planned["rows"]
    assert plain["peak"] == pytest.approx(22763 << 20, rel=0.02)
    assert plain["most_pairs"] == pytest.approx(597, rel=0.02)
    assert (plain["fits"], planned["fastest"]) == (True, "plain")
    assert plain["most_pairs"] < checkpointed["most_pairs"] < cached["most_pairs"]
    assert (plain["at_least"], cached["at_least"]) == (False, True)
    assert both["peak"] < min(cached["peak"], checkpointed["peak"])
    hours = 3 * 12.4e6 / plain["images_per_s"] / 3600
    one = call("plan", "open_clip:ViT-B-32", "--card", "3090", *options).stdout
    assert f"3 epochs of 12,400,000 pairs: {hours:.1f} hours" in one
    small = call("plan", "open_clip:ViT-B-32", "--card", "3080", *options).stdout
    assert "--set data.batch_size=600 --set data.micro_batch=150" in small
    assert call("plan", "open_clip:ViT-B-32", "--card", "10GB", *options).stdout.splitlines()[
        -5:-3
    ] == [
        "paste    --set data.batch_size=600 --set data.micro_batch=null",
        "         --set model.grad_checkpointing=true",
    ]


@pytest.mark.slow
def test_a_model_without_gradient_caching():
    result = call("plan", "open_clip:RN50", "--card", "8GB", "--json")
    forms = {row["form"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(forms) == ["plain", "checkpointed"]
    assert not forms["plain"]["fits"]
    assert 0 < forms["plain"]["most_pairs"] < 256


def test_cards_and_wrong_usage(tiny):
    sizes = {"12GB": 12 * GIB, "12000 mb": 12000 << 20, "1.5 gib": 3 * GIB // 2}
    assert {text: parse_card(text) for text in sizes} == {
        text: (None, size) for text, size in sizes.items()
    }
    for text in ("RTX 3090", "3090", "rtx_3090"):
        assert parse_card(text) == ("rtx-3090", 24 * GIB)
    assert "Missing option '--card'" in call("plan", tiny).output
    assert "got 'siclip-s9'" in call("plan", "siclip-s9", "--card", "3090").output
    assert "expected one of rtx-2080-ti" in call("plan", tiny, "--card", "rtx-3091").output


def test_a_torch_without_cuda(tiny, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    result = call("plan", tiny, "--card", "3090")
    assert result.exit_code == 2
    assert "torch: expected a build with CUDA" in result.output


def test_memory_of_a_container(tmp_path, monkeypatch):
    """Its limit counts, not the memory of the machine; "max" is no limit."""
    cpu, files = torch.device("cpu"), (tmp_path / "memory.max", tmp_path / "limit_in_bytes")
    monkeypatch.setattr(hardware, "LIMITS", files)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    machine = hardware.total_memory(cpu)
    for text, expected in (("max\n", machine), (f"{2**63 - 4096}\n", machine), ("65536\n", 65536)):
        files[1].write_text(text)
        assert hardware.total_memory(cpu) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.total_memory(cpu) == 16384


def test_an_op_takes_the_longest_of_products_bytes_and_launch():
    product = Work("product", 2e12, 3e6, half=True, runs=0)
    copy = Work("bytes", 0, 2e9, half=False, runs=0, times=2)
    few = Work("attention", 10, 10, half=True, runs=1)
    expected = [
        2e12 / CARD.half / 1e9 / RATES["rtx-3090", "infer"]["product"],
        2 * 2e9 / CARD.bandwidth / 1e6 / RATES["rtx-3090", "infer"]["bytes"],
        3 * RATES["rtx-3090", "train"]["launch"],
    ]
    for work, time in zip((product, copy, few), expected):
        assert step_ms([work], "rtx-3090") == pytest.approx(time)
    again = few._replace(runs=2)
    assert step_ms([again], "rtx-3090") > step_ms([few], "rtx-3090")


def test_the_meter_counts_what_lives():
    device = torch.device("cuda:0")
    with fake_device([], device) as meter:
        with meter:
            x = [torch.empty(100, 100, device=device)]
        results = []
        counted = meter.count(lambda: results.append(torch.mm(x[0], x.pop()).t()))
        assert (counted.kept, counted.peak, meter.live) == (0, 40448, 40448)
        assert [(work.kind, work.flops) for work in counted.works] == [("product", 2 * 100**3)]
        results.clear()
        assert meter.live == 0
