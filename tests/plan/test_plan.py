"""simplclip plan: predicted peaks against measured ones, and cases that it refuses."""

import json

import pytest
import torch
from open_clip import add_model_config

from simplclip import models
from simplclip.plan import actual, fake, measure
from simplclip.plan.cards import CARDS
from simplclip.plan.count import UncountedOp
from simplclip.plan.step import FewMicroBatches, TrainerStep, busiest_step, shapes_of
from simplclip.plan.time import step_time
from simplclip.train import config, setup
from simplclip.train.objective import Objective
from support.devices import NATIVE_BF16
from support.programs import call

pytestmark = pytest.mark.long


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIGMOID, MATCHING = "loss.base=sigmoid", "loss.pm_weight=1"
WIKD = ["loss.feature_weight=1", "loss.relational_weight=1", "loss.interactive_weight=1"]
LAYERS = "model.options.text_cfg.layers=3"
SMALL = {"width": 64, "heads": 2, "layers": 2, "vocab_size": 1000}
PLAIN = {  # models of each kind in open_clip
    "small-vit": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "small-resnet": {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
}
LARGER = [
    pytest.param(n, marks=pytest.mark.prove)
    for n in ("RN50", "MobileCLIP2-S0", "ViT-B-16-SigLIP", "convnext_base")
]
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="torch is a build without CUDA"
)


@pytest.fixture(scope="module", autouse=True)
def plain_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in PLAIN.items():
        values = {"embed_dim": 32, "text_cfg": SMALL, "vision_cfg": vision | {"image_size": 64}}
        (folder / f"{name}.json").write_text(json.dumps(values))
    add_model_config(folder)


def trainer(name, precision, *changes):
    return TrainerStep(config.load(name, changes), precision, teacher_width=256)


def predict(name, *changes, device=CPU, precision="fp32"):
    return measure.predict(trainer(name, precision, *changes), device)


# Relative to the allocator's peak. oneDNN's memory in bfloat16 products is not counted.
WITHIN = {"fp32": 0.01, "bf16": 0.02}


def check(step, within):
    """Compares the prediction with the allocator's peak over two real steps, on the CPU."""
    if step.precision == "bf16" and not NATIVE_BF16:
        pytest.skip("oneDNN copies bfloat16 to float32 on this CPU")
    torch.manual_seed(0)
    predicted = measure.predict(step, CPU)
    assert predicted.peak == pytest.approx(actual.peak_bytes(step, CPU), rel=within)
    assert sum(predicted.at_peak.values()) == predicted.peak


CAPTIONS, RECOMPUTE = "data.captions_per_image=2", "model.recompute=true"
CASES = {
    "one graph": [],
    "short texts": ["data.mean_tokens=3"],
    "averages": ["optim.ema=0.99", "data.batch_size=24"],
    "Lion, a frozen tower": ["optim.name=lion", "optim.lr_scale={visual: 0}"],
    "LAMB, layer decay": ["optim.name=lamb", "optim.layer_decay=0.5"],
    "cached WIKD": [*WIKD, MATCHING, CAPTIONS, "data.micro_batch=16", "loss.plane=hadamard"],
    "WIKD, recomputed": [*WIKD, RECOMPUTE, LAYERS, "data.batch_size=64", "loss.interactive=kl"],
    "sigmoid, cached": [*WIKD, MATCHING, CAPTIONS, "data.micro_batch=32", SIGMOID],
}
# in the suite; make prove takes all
FEW = [("one graph", "fp32"), ("one graph", "bf16"), ("cached WIKD", "fp32")]
S0 = {
    "one graph": ["data.batch_size=8", "data.micro_batch=null"],
    "cached WIKD and PM": [*WIKD, MATCHING, "data.batch_size=20", "data.micro_batch=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(case, precision, marks=[] if (case, precision) in FEW else pytest.mark.prove)
        for precision in ("fp32", "bf16")
        for case in CASES
    ],
)
def test_siclip_tiny(tiny, case, precision):
    check(trainer(tiny, precision, *CASES[case]), WITHIN[precision])


@pytest.mark.slow
# Muon has two moments of what is no matrix; it and NovoGrad read the number of the step
@pytest.mark.parametrize(("name", "moments"), [("muon", 1), ("novograd", 1)])
def test_the_optimizers_state_counts(tiny, name, moments):
    values = f"optim.name={name}", "data.batch_size=2"
    model, _ = shapes_of(config.load(tiny, values))
    size = sum(4 * weight.numel() for weight in model.parameters())
    assert predict(tiny, *values).at_peak["optimizer state"] == pytest.approx(moments * size, 0.01)


@pytest.mark.prove
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", S0)
def test_siclip_s0(precision, case):
    check(trainer("siclip2-s0", precision, *S0[case]), WITHIN[precision])


@pytest.mark.slow
@pytest.mark.prove
def test_checkpointed_open_clip_model(tiny):
    changes = ["model={name: 'open_clip:ViT-B-32', recompute: true}", "data.batch_size=12"]
    # At the peak, the gradient of the first convolution runs, for which oneDNN takes 37 MiB that
    # are stated nowhere.
    check(trainer(tiny, "fp32", *changes), within=0.02)


@pytest.mark.slow
def test_only_adapters_have_gradients_and_moments(tiny):
    model = "model={name: 'open_clip:small-vit', lora: {rank: 4, dropout: 0.1}}"
    vocabulary = "model.options.text_cfg.vocab_size=49408"
    cached = ["data.batch_size=24", "data.micro_batch=8", "optim.ema=0.9"]
    step = trainer(tiny, "fp32", model, vocabulary, *cached)
    names = {name for name, p in step.prepared.model.named_parameters() if p.requires_grad}
    assert len(names) == 1 + 2 * (8 + 8)
    assert all(".lora_" in name for name in names - {"logit_scale"})
    check(step, within=0.01)


@pytest.mark.slow
def test_terms_that_come_later_count(tiny):
    later = [
        "loss.relational_weight={value: 0, to: 1, start: 10}",
        "loss.pm_weight={value: 1, until: 30}",
    ]
    assert busiest_step(config.load(tiny, later)) == 11
    # the loss takes most; forward keeps all rows
    shared = ["data.batch_size=4096", "data.micro_batch=8"]

    def peak(*changes):
        return predict(tiny, *shared, *changes).peak

    assert peak(*later) == peak("loss.relational_weight=1", MATCHING) > peak(MATCHING)


@pytest.fixture
def whole_steps(monkeypatch):
    """Returns a function from whose call on all micro-batches run."""
    batches = TrainerStep.batches

    def run_all():
        monkeypatch.setattr(TrainerStep, "_skip_micro_batches", lambda *_: None)
        monkeypatch.setattr(TrainerStep, "batches", lambda step, real: batches(step, real=True))

    return run_all


@pytest.mark.prove
def test_micro_batches_that_do_not_run_count(tiny, whole_steps):
    """Those between the first and the last, with the memory and the time of the first."""

    def usages():
        return [predict(tiny, SIGMOID, f"data.micro_batch={micro}") for micro in (24, 12)]

    shortened = usages()
    assert shortened[1].peak < shortened[0].peak
    whole_steps()
    for few, every in zip(shortened, usages()):
        assert few.peak == pytest.approx(every.peak, rel=1e-3)
        few, every = (step_time(usage.kernels, CARDS["rtx-3090"]) for usage in (few, every))
        assert few.likely == pytest.approx(every.likely, rel=0.02)
        assert few.launches == pytest.approx(every.launches, rel=0.02)


@pytest.mark.slow
@pytest.mark.prove
def test_outputs_that_gradient_caching_keeps(monkeypatch, whole_steps):
    """Those of frozen layers, also of micro-batches that do not run."""
    values = {
        "model": {"name": "siclip-lite0"},
        "inherit": {"source": ["efficientnet-lite0", "minilm"]},
        "data": {"train": "nowhere/*.tar", "batch_size": 40, "micro_batch": 4},
        "run": {"out": "runs/none", "steps": 10},
    }
    step = TrainerStep(config.from_dict(values), "fp32")
    check(step, within=0.02)

    def peak():
        return measure.predict(step, CPU).peak

    shortened = peak()
    monkeypatch.setattr(FewMicroBatches, "_keep", lambda *_: None)
    assert peak() < 0.999 * shortened
    whole_steps()
    assert peak() == pytest.approx(shortened, rel=1e-3)


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize("name", ["small-resnet", *LARGER])
def test_plain_models_on_a_card(tiny, name):
    """For each kind of tower, twice the pairs take about twice the activations."""
    model = f"model={{name: 'open_clip:{name}'}}"
    one, two = (
        predict(tiny, model, f"data.batch_size={n}", device=CUDA, precision="bf16")
        for n in (32, 64)
    )
    ratio = two.at_peak["activations"] / one.at_peak["activations"]
    assert 1 < ratio < 2.1
    assert all(change % 512 == 0 for _, change in one.events)


@pytest.mark.slow
@needs_cuda_build
@pytest.mark.parametrize(
    ("precision", "size"), [pytest.param("fp32", 4, marks=pytest.mark.prove), ("bf16", 2)]
)
def test_attention_on_a_card_keeps_no_matrix(tiny, monkeypatch, precision, size):
    """Plain products would keep [B, H, L, L] in both blocks of each tower."""
    changes = "model={name: 'open_clip:small-vit'}", "data.batch_size=32"

    def activations():
        step = predict(tiny, *changes, device=CUDA, precision=precision)
        return step.at_peak["activations"]

    fused = activations()
    monkeypatch.setattr(fake, "attention_of_card", lambda plain: plain)
    assert activations() - fused > 0.9 * 2 * 32 * 2 * (65**2 + 77**2) * size


def opaque(x):
    """Runs an op without a fake function, in a namespace that torch runs on made-up values."""
    lib = torch.library.Library("vision", "FRAGMENT")
    lib.define("opaque(Tensor x) -> Tensor")
    lib.impl("opaque", lambda x: x.clone(), "CPU")
    return torch.ops.vision.opaque(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "message"),
    [
        (opaque, "vision::opaque: its memory cannot be predicted"),
        (lambda x: x * x.max().item(), "since it does not run on fake tensors: DataDependent"),
        (lambda x: x[x > 0], "since it does not run on fake tensors: DynamicOutputShape"),
    ],
)
def test_an_op_that_does_not_run_on_fake_tensors_is_an_error(tiny, monkeypatch, op, message):
    original = Objective.__call__

    def with_op(objective, step, image, *rest):
        return original(objective, step, op(image), *rest)

    monkeypatch.setattr(Objective, "__call__", with_op)
    with pytest.raises(UncountedOp, match=message):
        predict(tiny, "data.batch_size=8")


@pytest.mark.slow
def test_shapes_are_those_of_the_run(tiny, tmp_path):
    """No tensor has values, and the same modules are frozen as in a run, which inherits them."""
    original = models.create("siclip-tiny", text_cfg={"layers": 1}, simplified=False)
    torch.save(original.state_dict(), tmp_path / "a.pt")
    values = config.load(tiny, [f"inherit.source={tmp_path / 'a.pt'}", "inherit.blocks=first"])
    with torch.device("meta"):
        model, frozen = shapes_of(values)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert frozen == setup.load_model(values)[1] != []


@pytest.mark.slow
def test_what_is_not_on_this_machine_is_assumed(tiny, tmp_path):
    """The shards and the file of weights are missing; only the shapes of their tensors matter."""
    changes = f"data.train={tmp_path}/*.tar", f"inherit.source={tmp_path}/s0.pt"
    step = TrainerStep(config.load("siclip-s0", changes), "fp32")
    assert step.teacher["width"] == 512
    teacher = "a teacher of the student's width, 512 (--teacher-width): "
    assert any(line.startswith(teacher) for line in step.assumed)
    assert "visual.trunk.stages.0" in step.prepared.frozen
    assert len(step.prepared.folded) >= 8
    compiled = trainer(tiny, "fp32", "run.compile=true")
    assert "the memory of towers that are not compiled" in compiled.assumed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "rtx-3091"], "--card: expected one of rtx-3060"),
        (["--memory", "1GiB"], "is a build without CUDA, which plans for a card need (the card "),
    ],
)
def test_bad_input_of_a_torch_without_cuda(tiny, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.version, "cuda", None)
    result = call("plan", tiny, *arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
@pytest.mark.gpu
def test_predicted_and_measured_on_a_gpu(tiny):
    """To a tenth, since cuDNN's workspaces are not stated."""
    step = trainer(tiny, "bf16", "data.batch_size=512")
    predicted = measure.predict(step, CUDA).peak
    torch.cuda.empty_cache()
    assert predicted == pytest.approx(actual.peak_bytes(step, CUDA), rel=0.1)
