"""simplclip plan: predicted peaks against measured ones, the values that it solves for, and cases that it refuses."""

import io
import json
import re

import pytest
import torch
from open_clip import add_model_config, create_model
from paths import ROOT
from rich.console import Console
from typer.testing import CliRunner

from simplclip.commands.main import app
from simplclip.memory import fake, report
from simplclip.memory.count import UncountedOp
from simplclip.memory.measure import measure, predict
from simplclip.memory.plan import _Planner, largest, make, parse_memory
from simplclip.memory.step import OpenClipStep, TrainerStep, busiest_step
from simplclip.train import config
from simplclip.train.limits import GIB, Budget

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TINY_CONFIG = str(ROOT / "examples/emoji/siclip-tiny.yaml")
CACHED, SIGMOID = "model.freeze_norms=true", "loss.base=sigmoid"
WIKD = ["loss.feature_weight=1", "loss.relational_weight=1", "loss.interactive_weight=1"]
LAYERS = "model.options.text_cfg.layers="
SMALL = {"width": 64, "heads": 2, "layers": 2}
PLAIN = {  # models of each kind in open_clip
    "small-vit": {"vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}},
    "small-resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": SMALL | {"vocab_size": 1000},
    },
}
LARGER = [pytest.param(n, marks=pytest.mark.prove) for n in ("RN50", "MobileCLIP2-S0", "ViT-B-16-SigLIP", "convnext_base")]
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")


@pytest.fixture(scope="module", autouse=True)
def plain_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, values in PLAIN.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, "text_cfg": SMALL, **values}))
    add_model_config(folder)


def trainer(name, precision, *changes):
    changes = [f"{LAYERS}1", *changes] if name == TINY_CONFIG else changes
    return TrainerStep(config.load(name, changes), precision, teacher_width=256)


# Relative to the allocator's peak. oneDNN's memory in bfloat16 products is not counted.
WITHIN = {"fp32": 0.01, "bf16": 0.02}


def check(make, within=WITHIN["fp32"]):
    """Compares the prediction with the allocator's peak over two real steps, on the CPU."""
    torch.manual_seed(0)
    predicted = predict(make(), CPU)
    real = measure(make(), CPU)
    assert predicted.peak == pytest.approx(real, rel=within)
    assert sum(predicted.at_peak.values()) == predicted.peak


CACHED_TINY = [CACHED, "data.batch_size=96", "data.micro_batch=32"]
MATCHING = "loss.pm_weight=1"
TINY = {
    "one graph": ["data.batch_size=96"],
    "short texts": ["data.batch_size=96", "data.mean_tokens=3"],
    "cached WIKD": [*CACHED_TINY, *WIKD, MATCHING, "loss.plane=hadamard", "data.captions_per_image=2"],
    "WIKD, recomputed": [*WIKD, "data.batch_size=64", "loss.interactive=kl", "model.recompute=true", f"{LAYERS}3"],
    "sigmoid, towers": [
        *[SIGMOID, MATCHING, *WIKD, *CACHED_TINY[:2]],
        *["data.micro_batch={image: 32, text: 45}", "data.captions_per_image=2"],
    ],
}
S0 = {
    "one graph": ["data.batch_size=8", "data.micro_batch=null"],
    "cached WIKD and PM": [*WIKD, MATCHING, "data.batch_size=20", "data.micro_batch=4"],
}


IN_BF16 = ("one graph",)  # in the suite; make prove takes all


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in TINY),
        *(pytest.param(name, "bf16", marks=[] if name in IN_BF16 else pytest.mark.prove) for name in TINY),
    ],
)
def test_siclip_tiny(name, precision):
    check(lambda: trainer(TINY_CONFIG, precision, *TINY[name]), WITHIN[precision])


@pytest.mark.prove
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", S0)
def test_siclip_s0(precision, name, tmp_path):
    torch.manual_seed(0)
    torch.save(create_model("MobileCLIP2-S0", pretrained_image=False).state_dict(), tmp_path / "s0.pt")
    check(lambda: trainer("siclip2-s0", precision, f"inherit.source={tmp_path / 's0.pt'}", *S0[name]), WITHIN[precision])


@pytest.mark.prove
@pytest.mark.parametrize(("precision", "teacher_width"), [("fp32", None), ("bf16", None), ("bf16", 512)])
def test_vit_b_32_with_open_clips_losses(precision, teacher_width):
    """The loss is ClipLoss, or with a teacher's features DistillClipLoss."""
    check(lambda: OpenClipStep("open_clip:ViT-B-32", 24, precision, teacher_width), WITHIN[precision])


@pytest.mark.prove
def test_checkpointed_open_clip_model():
    changes = ["model.name=open_clip:ViT-B-32", "data.batch_size=12", "model.recompute=true"]
    # At the peak, the gradient of the first convolution runs, for which oneDNN takes 37 MiB that are stated nowhere.
    check(lambda: trainer(TINY_CONFIG, "fp32", *changes), within=0.02)


@pytest.mark.slow
def test_terms_that_come_later_count():
    later = ["run.steps=50", "loss.relational_weight={value: 0, to: 1, start: 10}", "loss.pm_weight={value: 1, until: 30}"]
    assert busiest_step(config.load(TINY_CONFIG, later)) == 11
    shared = ["data.batch_size=4096", "data.micro_batch=8", CACHED]  # the loss takes most; forward keeps all rows
    peak = lambda *changes: predict(trainer(TINY_CONFIG, "fp32", *shared, *changes), CPU).peak  # noqa: E731
    assert peak(*later) == peak("loss.relational_weight=1", MATCHING) > peak(MATCHING)


@pytest.mark.slow
def test_a_run_of_epochs_is_planned_without_its_data():
    changes = ["data.train=nowhere.tar", "optim.warmup=0", "loss.pm_weight={value: 0, to: 1, start: 9}"]
    plan = make(config.load(TINY_CONFIG, [*changes, "run.epochs=3"]), Budget(24 * GIB), device="cpu", solve=False)
    assert plan.usage.peak == predict(trainer(TINY_CONFIG, plan.precision, *changes, "run.steps=50", f"{LAYERS}2"), CPU).peak


@pytest.mark.slow
def test_micro_batches_of_each_tower(monkeypatch):
    """A smaller micro-batch of the larger tower lowers the peak; merged micro-batches of both towers change nothing."""
    cached = [SIGMOID, CACHED, "data.batch_size=96"]
    peak = lambda micro: predict(trainer(TINY_CONFIG, "fp32", *cached, f"data.micro_batch={micro}"), CPU).peak  # noqa: E731
    assert peak("{image: 24, text: 24}") == pytest.approx(peak(24), rel=1e-3)  # captions are copied on this device
    assert peak("{image: 12, text: 24}") < peak(24)
    step = trainer(TINY_CONFIG, "fp32", *cached, "data.micro_batch={image: 24, text: 20}")
    batches = step.batches
    monkeypatch.setattr(step, "batches", lambda real: batches(real=True))
    assert predict(step, CPU).peak == pytest.approx(peak("{image: 24, text: 20}"), rel=1e-3)


@pytest.mark.slow
def test_short_texts_take_less_in_one_graph():
    """Texts have 12 of 16 tokens. Micro-batches are cut to have as many tokens as padded texts."""
    kept = lambda *changes: predict(trainer(TINY_CONFIG, "fp32", *changes), CPU).at_peak["activations"]  # noqa: E731
    texts = 64 * 4 * 7 * 256 * 4 * 0.9  # most of the memory that is kept for 4 tokens in one block
    assert kept("data.batch_size=64") - kept("data.batch_size=64", "data.mean_tokens=3") > texts
    cached = [CACHED, "data.batch_size=64", "data.micro_batch=16"]
    assert kept(*cached) == kept(*cached, "data.mean_tokens=3")
    changes = ["data.mean_tokens=3", "run.compile=true"]
    assert "data.mean_tokens: compiled towers crop" in trainer(TINY_CONFIG, "fp32", *changes).assumed[-1]


@pytest.mark.slow
def test_weights_that_are_not_here_do_not_hide_that_texts_can_be_cropped():
    changes = ["model.name=open_clip:ViT-S-32-alt", "inherit.source=ViT-S-32-alt/nowhere", "inherit.train=[visual]"]
    assert trainer(TINY_CONFIG, "fp32", *changes, "data.mean_tokens=14").tokens == 24


@pytest.mark.slow
@pytest.mark.parametrize(("base", "loss"), [("contrastive", "ClipLoss"), ("sigmoid", "SigLipLoss")])
def test_open_clips_loss_is_that_of_the_base(monkeypatch, base, loss):
    """SigLipLoss has no form with a teacher, and needs a bias, which the model lacks by default."""
    compared = []

    def answer(self, what, usage, *rest):
        compared.append((what, usage(4).peak))

    monkeypatch.setattr(_Planner, "_answer", answer)
    for changes in (), ("loss.relational_weight=1",):
        chosen = config.load(TINY_CONFIG, [f"loss.base={base}", "model.name=open_clip:small-vit", *changes])
        planner = _Planner(chosen, Budget(GIB), "cpu", 256)
        planner.of_open_clip()
    distilling = loss if base == "sigmoid" else "DistillClipLoss"
    assert [what.rpartition(" ")[2] for what, _ in compared] == [loss, distilling]
    assert all(peak > 0 for _, peak in compared)


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("name", ["small-resnet", *LARGER])
def test_plain_models_on_a_card(name):
    """For each kind of tower and loss, twice the pairs take about twice the activations."""
    one, two = (predict(OpenClipStep(f"open_clip:{name}", n, "bf16"), CUDA) for n in (32, 64))
    assert one.at_peak["activations"] < two.at_peak["activations"] < 2.1 * one.at_peak["activations"]


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize(("precision", "size"), [pytest.param("fp32", 4, marks=pytest.mark.prove), ("bf16", 2)])
def test_attention_on_a_card_keeps_no_matrix(monkeypatch, precision, size):
    """Plain products would keep [B, H, L, L] in both blocks of each tower."""
    activations = lambda: predict(OpenClipStep("open_clip:small-vit", 32, precision), CUDA).at_peak["activations"]  # noqa: E731
    fused = activations()
    monkeypatch.setattr(fake, "attention_of_card", lambda plain: plain)
    assert activations() - fused > 0.9 * 2 * 32 * 2 * (65**2 + 77**2) * size


@pytest.mark.slow
@pytest.mark.parametrize(("device", "unit"), [(CPU, 1), pytest.param(CUDA, 512, marks=needs_cuda_build)])
def test_timeline_ends_where_it_began(device, unit):
    usage = predict(trainer(TINY_CONFIG, "fp32", "data.batch_size=8"), device)
    kinds, live, phases = usage.timeline(points=300)
    assert {"parameters", "gradients", "optimizer state", "activations"} <= set(kinds)
    assert {"encode", "loss", "backward", "optimizer"} == {name for _, name in phases}
    assert live.sum(0).max() == usage.peak
    assert live.shape[1] < 700
    assert live[kinds.index("activations")][-1] == 0
    assert all(change % unit == 0 for _, change in usage.events)


def opaque(x):
    """Runs an op without a fake function, in a namespace whose kernels torch would run on made-up values."""
    lib = torch.library.Library("vision", "FRAGMENT")
    lib.define("opaque(Tensor x) -> Tensor")
    lib.impl("opaque", lambda x: x.clone(), "CPU")
    return torch.ops.vision.opaque(x)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (opaque, "vision::opaque: its memory cannot be predicted"),
        (lambda x: x * x.max().item(), "since it does not run on fake tensors: DataDependent"),
        (lambda x: x[x > 0], "since it does not run on fake tensors: DynamicOutputShape"),
    ],
)
def test_an_op_that_does_not_run_on_fake_tensors_is_an_error(op, message):
    step = trainer(TINY_CONFIG, "fp32", "data.batch_size=8")
    original = step.objective
    step.objective = lambda step_, image, *rest: original(step_, op(image), *rest)
    with pytest.raises(UncountedOp, match=message):
        predict(step, CPU)


@pytest.mark.parametrize(
    ("peak", "limit", "most"),
    [
        (lambda n: 3 * n + 100, 1000, 300),
        (lambda n: 1000 * n + 5, 10**7 + 3, 9999),
        (lambda n: 7 * n, 6, 0),
        (lambda n: 100 * n + 5000 * (n // 7), 123_456, 153),
    ],
)
def test_the_largest_batch(peak, limit, most):
    found, seen = largest(peak, limit)
    assert found == most
    assert found + 1 in seen
    assert len(seen) <= 7
    assert largest(peak, limit, most=most // 2)[0] == most // 2


def test_memory_of_cards():
    assert {parse_memory(name) for name in ("24GiB", "RTX 3090", "rtx-4090", "3090")} == {24 * GIB}
    assert (parse_memory("12GB"), parse_memory("12000 mb"), parse_memory("1.5 gib")) == (12 * GIB, 12000 << 20, 3 * GIB // 2)
    assert 0.8 * 24 * GIB < Budget(24 * GIB).usable < 24 * GIB - Budget(24 * GIB).context


def call(name, *arguments):
    layers = ["--set", f"{LAYERS}1"] if name == TINY_CONFIG else []
    return CliRunner().invoke(app, ["plan", name, *map(str, arguments), *layers])


@pytest.mark.slow
def test_answers_fit_and_one_more_does_not(tmp_path):
    picture = tmp_path / "plan.png"
    options = ("--set", "data.batch_size=64", "--set", CACHED, "--micro-batch", 16, "--device", "cpu", "--picture", picture)
    plan = json.loads(call(TINY_CONFIG, "--memory", "1200MiB", *options, "--json").stdout)
    as_is, one_graph, cached = plan["answers"]
    assert (as_is["batch_size"], as_is["micro_batch"], as_is["fits"], plan["measured"]) == (64, 16, True, None)
    for answer, unit in ((one_graph, 1), (cached, 16)):
        assert answer["peak"] <= plan["usable"] < answer["next_peak"]
        assert answer["next_batch_size"] == answer["batch_size"] + unit
    assert cached["batch_size"] > 4 * one_graph["batch_size"]
    assert sum(plan["components"].values()) == as_is["peak"]
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@needs_cuda_build
def test_a_step_that_does_not_fit():
    shown = call(TINY_CONFIG, "--memory", "1GiB", "--set", "data.batch_size=512").output
    assert re.search(r"as configured +512 +all +0\.\d+ GiB +no", shown)
    for words in (
        "most in one graph",
        "activations",
        "total",
        "measured   nothing",
        "assumed",
        "in the loss, chunks of 128 MiB",
        "a smaller data.batch_size",
    ):
        assert words in shown


@pytest.mark.slow
def test_where_little_is_used_nothing_is_advised():
    text = io.StringIO()
    chosen = config.load(TINY_CONFIG, [f"{LAYERS}1", "data.batch_size=8"])
    report.show(make(chosen, Budget(24 * GIB), device="cpu", solve=False), Console(file=text))
    assert re.search(r"advice     fits, nothing to do: \d% of the usable memory\n$", text.getvalue())


@pytest.mark.slow
def test_what_is_not_on_this_machine_is_assumed(tmp_path):
    """The shards and the file of weights are missing; only the shapes of their tensors matter."""
    changes = f"data.train={tmp_path}/*.tar", f"inherit.source={tmp_path}/s0.pt", "data.batch_size=256"
    step = TrainerStep(config.load("siclip-s0", changes), "fp32")
    assert step.teacher["width"] == 512
    told = "a teacher of the student's width, 512 (--teacher-width): data.train:"
    assert any(line.startswith(told) for line in step.assumed)
    assert f"weights of mobileclip-s0, since {tmp_path}/s0.pt is not on this machine" in step.assumed
    assert "visual.trunk.stages.0" in step.inheritance.names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY_CONFIG, "--memory", "rtx-3091"], "memory: expected a size such as 24GiB or one of rtx-3090"),
        ([TINY_CONFIG, "--memory", "1GiB", "--compare", "timm"], "--compare: expected open_clip, got 'timm'"),
        ([TINY_CONFIG, "--memory", "1GiB", "--device", "tpu"], "--device: expected cuda or cpu, got 'tpu'"),
        ([TINY_CONFIG, "--memory", "1GiB"], "is a build without CUDA, which plans for a card need (the card itself is not"),
    ],
)  # fmt: skip
def test_bad_input_of_a_torch_without_cuda(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.version, "cuda", None)
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [True, False])
def test_predicted_and_measured_on_a_gpu(ours):
    """The prediction lies within a tenth of the measurement, since cuDNN's workspaces are not stated."""

    def make():
        return trainer(TINY_CONFIG, "bf16", "data.batch_size=512") if ours else OpenClipStep("open_clip:ViT-B-32", 64, "bf16")

    predicted = predict(make(), CUDA).peak
    torch.cuda.empty_cache()
    assert predicted == pytest.approx(measure(make(), CUDA), rel=0.1)
