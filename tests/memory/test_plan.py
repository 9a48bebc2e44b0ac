"""simplclip plan: predicted peaks against real ones, what it solves for, and what it refuses to predict."""

import json

import pytest
import torch
from open_clip import create_model
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from simplclip import cli
from simplclip import memory as planning
from simplclip.memory import pretend
from simplclip.memory.count import KINDS, Counter, UncountedOp
from simplclip.memory.measure import measure, predict
from simplclip.memory.plan import largest
from simplclip.memory.step import OpenClipStep, TrainerStep, busiest
from simplclip.memory.workspaces import packing_bytes
from simplclip.ops import backends
from simplclip.train import config
from simplclip.train.limits import GIB, Budget

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
CACHED = "model.freeze_norms=true"
WIKD = ["loss.feature_weight=1", "loss.relational_weight=1", "loss.interactive_weight=1"]
LARGER = [pytest.param(n, marks=pytest.mark.prove) for n in ("ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base")]
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")


@pytest.fixture(scope="module")
def s0_weights(tmp_path_factory):
    """A MobileCLIP2-S0 checkpoint with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("s0") / "s0.pt"
    torch.save(create_model("MobileCLIP2-S0", pretrained_image=False).state_dict(), path)
    return path


def trainer(name, precision, *changes):
    return TrainerStep(config.load(name, changes), precision, teacher_width=256)


def check(make, within=0.01):
    """Predicted within 1% of the allocator's peak over two real steps, on the CPU."""
    torch.manual_seed(0)
    predicted = predict(make(), CPU)
    real = measure(make(), CPU)
    assert predicted.peak == pytest.approx(real, rel=within)
    assert sum(predicted.at_peak.values()) == predicted.peak
    return predicted


CACHED_TINY = [CACHED, "data.batch_size=320", "data.micro_batch=64"]
TINY = {
    "one graph": ["data.batch_size=192"],
    "recompute": ["data.batch_size=192", "model.recompute=true"],
    "cached": [*CACHED_TINY, "loss.plane=hadamard", "loss.negatives=hard"],
    "cached WIKD": [*CACHED_TINY, *WIKD, "data.captions_per_image=2"],
    "WIKD": [*WIKD, "data.batch_size=96", "loss.interactive=kl", "loss.pm_weight=0"],
}
S0 = {
    "one graph": ["data.batch_size=8", "data.micro_batch=null"],
    "cached WIKD and PM": [*WIKD, "data.batch_size=20", "data.micro_batch=4", "loss.projection=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", TINY.values(), ids=TINY)
def test_siclip_tiny(precision, changes):
    check(lambda: trainer("siclip-tiny-emoji", precision, *changes))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.prove), "bf16"])
@pytest.mark.parametrize("name", S0)
def test_siclip_s0(precision, name, s0_weights):
    make = lambda: trainer("siclip-s0", precision, f"inherit.source={s0_weights}", *S0[name])  # noqa: E731
    usage = check(make)
    if precision == "fp32" and name == "one graph":  # frozen weights have no gradient and no moments
        trained = sum(p.numel() for p in make().model.parameters() if p.requires_grad)
        assert usage.at_peak["optimizer state"] == pytest.approx(8 * trained, rel=0.01)


@pytest.mark.prove
@pytest.mark.parametrize(("precision", "teacher_width"), [("fp32", None), ("bf16", None), ("bf16", 512)])
def test_vit_b_32_with_open_clips_losses(precision, teacher_width):
    """ClipLoss, and with a teacher's features DistillClipLoss."""
    check(lambda: OpenClipStep("ViT-B-32", 24, precision, teacher_width))


@pytest.mark.prove
def test_checkpointed_open_clip_model():
    changes = ["model.name=open_clip:ViT-B-32", "data.batch_size=12", "model.recompute=true"]
    # The last that runs, at the peak, is the gradient of a convolution, for which oneDNN takes 37 MiB that nobody states.
    usage = check(lambda: trainer("siclip-tiny-emoji", "fp32", *changes), within=0.02)
    assert usage.peak < predict(trainer("siclip-tiny-emoji", "fp32", *changes[:2]), CPU).peak


@pytest.mark.slow
@needs_cuda_build
def test_terms_that_come_later_count():
    shared = ["data.batch_size=65536", "data.micro_batch=8", CACHED, "run.steps=50"]  # the loss takes most
    later = [*shared, "loss.relational_weight={value: 0, to: 1, start: 10}", "loss.pm_weight={value: 1, until: 30}"]
    always = [*shared, "loss.relational_weight=1"]
    assert busiest(config.load("siclip-tiny-emoji", later)) == 11
    peaks = [predict(trainer("siclip-tiny-emoji", "fp32", *changes), CUDA).peak for changes in (later, always, shared)]
    assert peaks[0] == peaks[1] > peaks[2]


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("name", ["RN50", "MobileCLIP2-S0", *LARGER])
def test_plain_models_on_a_card(name):
    """Each kind of tower and loss; double the pairs, about double the activations."""
    one, two = (predict(OpenClipStep(name, n, "bf16"), CUDA) for n in (32, 64))
    assert set(one.at_peak) <= set(KINDS)
    assert one.at_peak["activations"] < two.at_peak["activations"] < 2.1 * one.at_peak["activations"]


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_on_a_card_keeps_no_matrix(monkeypatch, precision):
    """Plain products would keep [B, H, L, L] of each of the 12 image and 12 text blocks."""

    def activations():
        return predict(OpenClipStep("ViT-B-32", 32, precision), CUDA).at_peak["activations"]

    fused = activations()
    monkeypatch.setattr(pretend, "attention_of_card", lambda plain: plain)
    assert activations() - fused > 0.9 * 12 * 32 * (12 * 50**2 + 8 * 77**2) * (2 if precision == "bf16" else 4)


@pytest.mark.skipif(not backends.native_bf16, reason="no instructions for bfloat16 products")
def test_products_on_a_cpu_take_what_onednn_packs():
    counter = Counter(CPU)
    with FakeTensorMode(), counter.counting():
        a, b = torch.empty(512, 1024, dtype=torch.bfloat16), torch.empty(1024, 256, dtype=torch.bfloat16)
        held = sum(t.nbytes for t in (a, b, a @ b))
    assert counter.usage.peak - held == packing_bytes(512, 256, 1024, torch.bfloat16) > 10_000


@needs_cuda_build
def test_a_card_rounds_to_512_bytes():
    usage = predict(trainer("siclip-tiny-emoji", "fp32", "data.batch_size=8"), CUDA)
    assert all(change % 512 == 0 for _, change in usage.events)


def test_timeline_ends_where_it_began():
    usage = predict(trainer("siclip-tiny-emoji", "fp32", "data.batch_size=8"), CPU)
    kinds, live, phases = usage.timeline(points=300)
    assert {"parameters", "gradients", "optimizer state", "activations"} <= set(kinds)
    assert {"encode", "loss", "backward", "optimizer"} == {name for _, name in phases}
    totals = [sum(moment) for moment in zip(*live)]
    assert max(totals) == usage.peak
    assert len(totals) < 700
    assert live[kinds.index("activations")][-1] == 0


def opaque(namespace):
    """An op without a fake."""
    lib = torch.library.Library(namespace, "FRAGMENT")
    lib.define("opaque(Tensor x) -> Tensor")
    lib.impl("opaque", lambda x: x.clone(), "CPU")
    return lib, getattr(torch.ops, namespace).opaque


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: opaque("plantest"), "plantest::opaque: its memory cannot be predicted"),
        (lambda: opaque("vision"), "vision::opaque: its memory"),  # torch would run its kernel on made up values
        (lambda: (None, lambda x: x * x.max().item()), "since it does not run on fake tensors: DataDependent"),
        (lambda: (None, lambda x: x[x > 0]), "since it does not run on fake tensors: DynamicOutputShape"),
    ],
    ids=["no fake", "of a known namespace", "a value", "a shape"],
)
def test_an_op_that_does_not_run_on_fake_tensors_is_an_error(make, message):
    (_lib, op), step = make(), trainer("siclip-tiny-emoji", "fp32", "data.batch_size=8")
    original = step.objective
    step.objective = lambda step_, image, *rest: original(step_, op(image), *rest)
    with pytest.raises(UncountedOp, match=message):
        predict(step, CPU)


def test_the_largest_batch():
    for slope, offset, limit in ((3, 100, 1000), (1, 0, 7), (1000, 5, 10**7 + 3), (7, 0, 6)):
        found, seen = largest(lambda n, slope=slope, offset=offset: slope * n + offset, limit)
        assert found == (limit - offset) // slope
        assert found + 1 in seen
        assert len(seen) <= 6
    found, seen = largest(lambda n: 100 * n + 5000 * (n // 7), 123_456)
    assert seen[found] <= 123_456 < seen[found + 1]
    assert largest(lambda n: 5, 10, most=1000)[0] == 1000


def test_memory_of_cards():
    assert {planning.parse_memory(name) for name in ("24GiB", "RTX 3090", "rtx-4090", "3090")} == {24 * GIB}
    assert planning.parse_memory("12000MB") == 12_000_000_000
    assert planning.parse_memory("1.5 gib") == 3 * GIB // 2
    for bad in ("24", "0GiB", "rtx-3091", "lots"):
        with pytest.raises(ValueError, match="memory: expected a size such as 24GiB or one of rtx-3090"):
            planning.parse_memory(bad)
    assert 0.8 * 24 * GIB < Budget(24 * GIB).usable < 24 * GIB - Budget(24 * GIB).context


@pytest.mark.slow
def test_answers_fit_and_one_more_does_not():
    values = config.load("siclip-tiny-emoji", ["data.batch_size=64", "data.micro_batch=16", CACHED])
    budget = Budget(400 << 20, context=0, libraries=0)
    made = planning.make(values, budget, device="cpu")
    as_is, one_graph, cached = made.answers
    assert (as_is.batch_size, as_is.micro_batch) == (64, 16)
    assert made.fits
    for answer, unit in ((one_graph, 1), (cached, 16)):
        assert answer.peak <= budget.usable < answer.next_peak
        assert answer.next_batch_size == answer.batch_size + unit
    assert cached.batch_size > 4 * one_graph.batch_size
    small = planning.make(values, Budget(made.usage.peak, context=0, libraries=0), device="cpu", solve=False)
    assert small.usage.peak == made.usage.peak > small.budget.usable
    assert not small.fits


@pytest.mark.slow
def test_the_micro_batch_that_fits():
    def settings(micro):
        changes = ["data.batch_size=96", f"data.micro_batch={micro}", CACHED, "run.precision=fp32"]
        return config.load("siclip-tiny-emoji", changes)

    def fitting(memory):
        return planning.micro_batch_that_fits(settings("auto"), Budget(memory, context=0, libraries=0), device="cpu")

    small, large = (predict(TrainerStep(settings(micro), "fp32"), CPU).peak for micro in (12, 16))
    memory = int((small + large) / 2 / 0.96)
    assert fitting(memory).data.micro_batch == 12
    assert small < Budget(memory, context=0, libraries=0).usable < large
    assert fitting(GIB).data.micro_batch is None
    with pytest.raises(config.ConfigError, match="data.micro_batch: expected one that fits .* even with one image at a time"):
        fitting(50 << 20)


TINY_COMMAND = ("siclip-tiny-emoji", "--memory")


def call(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])


@needs_cuda_build
@pytest.mark.prove
def test_the_command_for_siclip_s0(tmp_path):
    options = ("--set", "data.batch_size=64", "--set", "loss.relational_weight=1", "--teacher-width", 512)
    result = call("siclip-s0", "--memory", "rtx-3060", *options, "--micro-batch", 16, "--compare", "open_clip", "--json",
                  "--picture", tmp_path / "plan.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    as_is, one_graph, cached, other = plan["answers"]
    assert as_is["fits"]
    assert as_is["micro_batch"] == 16
    assert "MobileCLIP2-S0, DistillClipLoss" in other["what"]
    assert one_graph["batch_size"] > 4 * other["batch_size"] > 0
    assert cached["batch_size"] > one_graph["batch_size"]
    for answer in (one_graph, cached, other):
        assert answer["peak"] <= plan["usable"] < answer["next_peak"]
    assert plan["measured"] is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.slow
@needs_cuda_build
def test_the_command():
    shown = call(*TINY_COMMAND, "24GiB", "--set", "data.batch_size=16")
    assert shown.exit_code == 0, shown.output
    for word in ("as configured", "most in one graph", "activations", "total", "assumed", "measured   nothing", "advice"):
        assert word in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY_COMMAND, "24"], "memory: expected a size such as 24GiB or one of"),
        ([*TINY_COMMAND, "1GiB", "--compare", "timm"], "--compare: expected open_clip, got 'timm'"),
        ([*TINY_COMMAND, "1GiB", "--device", "tpu"], "--device: expected cuda or cpu, got 'tpu'"),
        ([*TINY_COMMAND, "1GiB", "--micro-batch", "7"], "data.micro_batch: expected a divisor of"),
        ([*TINY_COMMAND, "1GiB", "--micro-batch", "x"], "data.micro_batch: expected a whole number or"),
        (["siclip-lite0-emoji", "--memory", "1GiB", "--set", "data.train=none/*.tar", "--device", "cpu"],
         "the pattern 'none/*.tar', which matches none. To plan without the shards: --teacher-width"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_a_torch_without_cuda_plans_for_cpus_only(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    result = call(*TINY_COMMAND, "1GiB")
    assert result.exit_code == 2
    assert "is a build without CUDA, which plans for a card need (the card itself is not needed)" in result.output
    assert call(*TINY_COMMAND, "1GiB", "--device", "cpu", "--set", "data.batch_size=16").exit_code == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make",
    [lambda: trainer("siclip-tiny-emoji", "bf16", "data.batch_size=512"), lambda: OpenClipStep("ViT-B-32", 64, "bf16")],
    ids=["siclip-tiny", "ViT-B-32"],
)
def test_predicted_and_measured_on_a_gpu(make):
    """Within a tenth: cuDNN's workspaces are not stated."""
    predicted = predict(make(), CUDA).peak
    torch.cuda.empty_cache()
    assert predicted == pytest.approx(measure(make(), CUDA), rel=0.1)
