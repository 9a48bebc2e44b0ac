"""Runs with model.lora: steps, gradient caching, checkpoints in two files, and what is refused."""

import math
import shutil
import sys
from functools import partial
from unittest import mock

import open_clip
import peft
import pytest
import torch
from torch import nn

import simplclip
from simplclip import models
from simplclip.common.errors import InputError
from simplclip.common.files import sha256
from simplclip.data.transforms import finish_on_device
from simplclip.models.inherit import inherit
from simplclip.models.trained import load_model, read_checkpoint
from simplclip.models.weights import CheckpointError, merged, plain_name
from simplclip.train import step
from simplclip.train.config import load
from simplclip.train.setup import load_start, make_state
from support.models import lora
from support.programs import call, one_line
from support.train.runs import bits, go, rows

CPU = torch.device("cpu")
KINDS = ("open-clip", "timm", "hugging-face")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    lora.register_models(folder)
    return folder


def started(folder, kind, *changes, **options):
    torch.manual_seed(1)
    state = make_state(lora.config_of(folder, kind, *changes, **options), CPU, "fp32")
    lora.started(state.model)
    return state


def side(kind):
    return 32 if kind == "timm" else 16


class PlainAttention(nn.Module):
    """The formula of an open_clip block's attention, with two linear layers."""

    def __init__(self, attention):
        super().__init__()
        self.heads = attention.num_heads
        width = attention.embed_dim
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(self, x, *_, need_weights, attn_mask):
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5 + (0 if attn_mask is None else attn_mask)
        return (self.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)),)


def theirs(folder, kind, values):
    """Returns a model with adapters by peft alone, with `values` by their names in ours.

    Not with peft's lora.MultiheadAttention, which counts the adapter of out_proj twice (0.21).
    """
    model = models.create(f"open_clip:lora-{kind}")
    model.load_state_dict(torch.load(folder / f"{kind}.pt"))
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, PlainAttention(module))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    pattern = "|".join(name.replace(".", r"\.") for name in layers)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=pattern)
    model = peft.inject_adapter_in_model(settings, model)
    model.logit_scale.requires_grad_(True)
    named = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    named["logit_scale"] = model.logit_scale
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])
    return model, named


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_those_of_torch_and_peft(folder, kind):
    state = started(folder, kind, "run.steps=10", "optim.lr=1e-3")
    ours = {n: p for n, p in state.model.state_dict(keep_vars=True).items() if p.requires_grad}
    model, named = theirs(folder, kind, ours)
    assert named.keys() == ours.keys()
    decayed = [p for name, p in named.items() if ".lora_" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [model.logit_scale]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    loss = open_clip.ClipLoss()
    model.train()
    for number in range(10):
        batch = lora.batch(seed=number, side=side(kind))
        row = step.train_step(state, [batch])
        images = finish_on_device(state.transform, batch["image"], CPU)
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(batch["text"].flatten(0, 1), normalize=True)
        optimizer.zero_grad()
        value = loss(image, text, model.logit_scale.exp())
        value.backward()
        norm = nn.utils.clip_grad_norm_(named.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        assert row["loss"] == pytest.approx(value.item(), rel=1e-6), number
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in named.items():
        assert (ours[name] - parameter).norm() <= 3e-6 * max(parameter.norm(), 1), name


def gradients(state):
    return {n: p.grad for n, p in state.model.named_parameters() if p.requires_grad}


def assert_equal(ours, expected, near=1e-6):
    assert ours.keys() == expected.keys()
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= near * size, name
        assert gradient.norm() > 0, name


def set_dropout(state, rate):
    for module in state.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.prove), 0.3])
def test_gradient_caching_is_one_graph(folder, kind, dropout):
    """Of cropped texts, and with dropout, also of Hugging Face's tower, drawn again."""
    settings = f"{{rank: 4, dropout: {dropout}}}"
    cached = started(folder, kind, "data.batch_size=6", "data.micro_batch=2", lora=settings)
    set_dropout(cached, dropout)
    step.keep_frozen(cached)
    parts = lora.batch(side=side(kind))
    batches = [{name: value[i : i + 2] for name, value in parts.items()} for i in (0, 2, 4)]
    torch.manual_seed(5)
    step.accumulate_gradients(cached, batches)
    whole = started(folder, kind, "data.batch_size=6", lora=settings)
    set_dropout(whole, dropout)
    torch.manual_seed(5)
    texts, order = step.text_batches(whole, batches)
    assert order is not None
    text = torch.cat([step.encode_text(whole, each) for each in texts])[order]
    image = torch.cat([step.encode_image(whole, each) for each in batches])
    loss, _ = step.compute_losses(whole, batches, image, text)
    loss.backward()
    assert_equal(gradients(cached), gradients(whole))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_have_the_same_gradient(folder, kind):
    plain, recomputed = (
        started(folder, kind, change, lora="{rank: 4, dropout: 0.3}")
        for change in ("model.grad_checkpointing=false", "model.grad_checkpointing=true")
    )
    for state in (plain, recomputed):
        torch.manual_seed(5)
        step.accumulate_gradients(state, [lora.batch(side=side(kind))])
    assert_equal(gradients(recomputed), gradients(plain))


EVALUATED = ["eval.hold_out=0.3", "eval.every=3", "run.save_every=2"]
EVALUATED += ["optim.ema=0.5", "optim.lr=0.01", "optim.layer_decay=0.7"]


@pytest.fixture(scope="module")
def trained(folder):
    """Returns the folder of a run with averages, dropout and a held-out share."""
    config = lora.config_of(folder, "open-clip", *EVALUATED, lora="{rank: 4, dropout: 0.1}")
    out = folder / "run"
    out.mkdir()
    (out / "base.pt").write_bytes(b"of a start that was killed before its first checkpoint")
    text = go(config, resume=True)
    assert "adapters of rank 4: 8 in the image tower, 8 in the text tower" in text
    assert "1,648,129 parameters, of which 8,193 train" in text
    return out


def features_of(model):
    given = lora.batch()
    with torch.no_grad():
        return torch.cat(
            [
                model.eval().encode_image(given["image"] / 255, normalize=True),
                model.encode_text(given["text"][:, 0], normalize=True),
            ]
        )


@pytest.mark.slow
def test_every_reader_gets_the_merged_weights_without_peft(folder, trained, tmp_path, monkeypatch):
    files = {name: torch.load(trained / name) for name in ("base.pt", "last.pt", "best.pt")}
    for name in ("last.pt", "best.pt"):
        assert "model" not in files[name]
        assert files[name]["base"] == sha256(trained / "base.pt")
    sizes = {name: (trained / name).stat().st_size for name in files}
    assert 10 * sizes["best.pt"] < 10 * sizes["last.pt"] < sizes["base.pt"]
    start = torch.load(folder / "open-clip.pt")
    kept = files["base.pt"]["weights"]
    assert len(kept) == len(start)
    assert bits({plain_name(name): value for name, value in kept.items()}) == bits(start)

    config = load(trained / "config.yaml")
    last = read_checkpoint(trained / "last.pt")
    live = make_state(config, CPU, "fp32", last)
    with live.ema.in_place():
        expected = features_of(live.model)
    monkeypatch.setitem(sys.modules, "peft", None)
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    model, _ = load_model(moved / "last.pt")
    near = partial(torch.allclose, rtol=0, atol=1e-5)
    assert near(features_of(model), expected)
    assert not near(
        features_of(models.create("open_clip:lora-open-clip", checkpoint=folder / "open-clip.pt")),
        expected,
    )
    created = models.create("open_clip:lora-open-clip", checkpoint=moved / "last.pt")
    assert torch.equal(features_of(created), features_of(model))
    other = models.create("open_clip:lora-open-clip")
    inherit(other, moved / "last.pt")
    assert torch.equal(features_of(other), features_of(model))
    result = call("export", moved / "last.pt", "--out", tmp_path / "export")
    assert result.exit_code == 0, result.output
    exported = simplclip.load(tmp_path / "export").model
    assert torch.equal(features_of(exported), features_of(model))
    last["config"]["model"]["checkpoint"] = "gone"  # base.pt has all of it
    assert bits(load_start(moved, last)[1]) == bits(start)
    best, state = load_model(moved)
    assert state["step"] == files["best.pt"]["step"]
    assert near(features_of(best), features_of(model)) == (state["step"] == 7)


@pytest.mark.slow
def test_a_missing_another_or_a_damaged_base_is_refused_by_name(folder, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = load(trained / "config.yaml", [f"run.out={run}"])
    readers = [
        partial(load_model, run / "last.pt"),
        partial(load_model, run),
        partial(go, config, resume=True),
        partial(models.create, "open_clip:lora-open-clip", checkpoint=run / "last.pt"),
    ]
    base = run / "base.pt"
    content = base.read_bytes()
    damaged = content[: len(content) // 2] + b"!" + content[len(content) // 2 + 1 :]
    for bad in (None, damaged):
        base.unlink(missing_ok=True)
        if bad is not None:
            base.write_bytes(bad)
        for read in readers:
            with pytest.raises(CheckpointError) as raised:
                read()
            message = str(raised.value)
            assert f".pt: expected {base} of its run, with the weights that LoRA keeps" in message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["model.lora={modules: ['*.c_fk']}"], r"match a linear layer, e.g. .*, got '\*\.c_fk'"),
        (["model={name: siclip-tiny, checkpoint: W, lora: {}}"], "without simplified blocks, got"),
        (["model.checkpoint=null"], "model.checkpoint: expected weights, which model.lora keeps"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(folder, tmp_path, changes, error):
    out = tmp_path / "run"
    changes = [change.replace("W", str(folder / "open-clip.pt")) for change in changes]
    if "siclip-tiny" in changes[0]:
        torch.save(models.create("siclip-tiny").state_dict(), tmp_path / "tiny.pt")
        changes = [changes[0].replace(str(folder / "open-clip.pt"), str(tmp_path / "tiny.pt"))]
    config = lora.config_of(folder, "open-clip", *changes, f"run.out={out}")
    with pytest.raises(InputError, match=error) as raised:
        go(config)
    assert "\n" not in str(raised.value)
    assert not out.exists()


def test_a_missing_peft_is_named_with_its_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    path = tmp_path / "config.yaml"
    path.write_text(lora.config_of(folder, "open-clip", f"run.out={tmp_path / 'run'}").to_yaml())
    line = one_line("train", path)
    assert line.endswith("this command needs the package peft: pip install 'simplclip[lora]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("open-clip", ["run.precision=bf16", "data.micro_batch=4"]),
        ("timm", ["model.freeze_norms=true", "model.lora.towers=[text]"]),
        pytest.param("open-clip", ["run.compile=true"], marks=pytest.mark.prove),
    ],
)
def test_other_settings(folder, tmp_path, kind, changes):
    plain = lora.config_of(folder, kind, f"run.out={tmp_path / 'plain'}", "run.steps=3")
    config = lora.config_of(folder, kind, f"run.out={tmp_path / 'run'}", "run.steps=3", *changes)
    with mock.patch("simplclip.train.loop.hardware.pick_device", return_value=CPU):
        go(config)
    if "towers" not in str(changes):
        go(plain)
        for row, expected in zip(rows(tmp_path / "run"), rows(tmp_path / "plain"), strict=True):
            assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=2e-2)
    state, start = read_checkpoint(tmp_path / "run/last.pt"), torch.load(folder / f"{kind}.pt")
    state["config"]["model"]["lora"]["alpha"] = 0.0  # the weights without what adapters add
    ours = merged(state)
    moved = {name for name, value in start.items() if not torch.equal(value, ours[name])}
    if "towers" in str(changes):
        assert moved == {n for n, t in start.items() if n.startswith("visual.")} | {"logit_scale"}
    else:
        assert moved == {"logit_scale"}
