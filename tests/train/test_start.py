"""Runs that start from trained weights, of other shapes too; averaged weights; compiled towers."""

import functools
import os
import shutil
from unittest import mock

import open_clip
import pytest
import tiny
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from runs import bits, check_resumed, go, state_of
from timm.layers import resample_abs_pos_embed

import simplclip
from simplclip import export, models
from simplclip.common.errors import InputError
from simplclip.models.weights import load_weights
from simplclip.train.config import ConfigError, load
from simplclip.train.state import Average, Training

CPU = (torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run in which every weight has changed."""
    folder = tmp_path_factory.mktemp("trained")
    go(tiny.settings(folder, "optim.lr=0.01", "optim.ema=0.5"))
    return folder / "run"


def started(folder, *changes):
    return Training(tiny.settings(folder, *changes), *CPU)


def weights_of(run):
    """Returns the weights of a run that evaluation uses."""
    state = state_of(run)
    return state["model"] | state.get("ema", {})


def record_updates(monkeypatch):
    """Returns a list that gets the trained weights, before the first step and after each step."""
    found = []

    class Recorded(Average):
        def __init__(self, model, decay):
            super().__init__(model, decay)
            found.append({name: self.weights[i].detach().clone() for name, i in self.names.items()})

        def update(self):
            super().update()
            found.append({name: self.weights[i].detach().clone() for name, i in self.names.items()})

    monkeypatch.setattr("simplclip.train.state.Average", Recorded)
    return found


def test_a_run_starts_from_another_runs_weights_at_other_shapes_and_needs_them_once(tmp_path, trained, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    monkeypatch.chdir(tmp_path)
    other = ["optim.lr=1e-4", "data.batch_size=4", "model.image_size=64", "model.context_length=20"]
    other.append("model.checkpoint=source")
    this = started(tmp_path, *other)
    old, new = weights_of(source), this.model.state_dict()
    resized = {"visual.trunk.pos_embed", "text.positional_embedding"}
    for name in new.keys() - resized:
        assert torch.equal(new[name], old[name]), name
    grid = resample_abs_pos_embed(old["visual.trunk.pos_embed"], [8, 8], num_prefix_tokens=0)
    assert torch.equal(new["visual.trunk.pos_embed"], grid)
    assert new["text.positional_embedding"].shape == (20, 256)
    torch.testing.assert_close(new["text.positional_embedding"][[0, -1]], old["text.positional_embedding"][[0, -1]])
    assert all(p.requires_grad for p in this.model.parameters())
    text = "\n".join(this.weights.lines())
    assert text.startswith("weights from source\n")
    for name in resized:
        assert [line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")] == ["resized"]

    config = tiny.settings(tmp_path, *other, "run.steps=3")
    text = go(config)
    assert "weights from source" in text
    assert "resized" in text
    shutil.rmtree(source)
    os.mkdir("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "weights from" not in go(load(tmp_path / "run" / "config.yaml", ["run.steps=4"]), resume=True)
    encoder = simplclip.load(tmp_path / "run")
    assert encoder.tokenizer(["a"]).shape == (1, 20)
    assert encoder.preprocess.size == (64, 64)
    export.run(tmp_path / "run", tmp_path / "export")
    again = simplclip.load(tmp_path / "export")
    assert torch.equal(again.encode_text(["a red bar"]), encoder.encode_text(["a red bar"]))


def test_sources_of_a_start(tmp_path, trained, monkeypatch):
    export.run(trained, tmp_path / "export")
    wanted = weights_of(trained)
    for source in (trained, trained / "last.pt", tmp_path / "export", next((tmp_path / "export").glob("*.safetensors"))):
        model = started(tmp_path, f"model.checkpoint={source}").model
        assert bits(dict(model.state_dict())) == bits({name: wanted[name] for name in model.state_dict()})
    for source, told in (
        ("nowhere.pt", "model.checkpoint: expected a file, open_clip's NAME/TAG .*, got nowhere.pt"),
        (tmp_path, "model.checkpoint: expected the folder of a run or of an export with weights for torch, got"),
        ("RN50/none", "model.checkpoint: expected open_clip's NAME/TAG, got RN50/none"),
    ):
        with pytest.raises(ConfigError, match=told):
            go(tiny.settings(tmp_path, f"model.checkpoint={source}"))
    torch.save({"a.weight": torch.ones(3), "b": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="expected weights of this model's architecture, got .*, of whose 2 tensors 0"):
        go(tiny.settings(tmp_path, f"model.checkpoint={tmp_path / 'other.pt'}"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="expected no checkpoint among them, which is the key model.checkpoint"):
        tiny.settings(tmp_path, "model.options.checkpoint=a.pt")


def test_what_is_new_and_what_is_left(trained):
    model = models.create("siclip-tiny", text_cfg={"layers": 2}, init_logit_bias=-10.0)
    table = load_weights(model, trained)
    status = {row.module: row.status for row in table.rows}
    assert status["logit_bias"] == status["text.transformer.resblocks.1"] == "new"
    plain = models.create("siclip-tiny", text_cfg={"layers": 1}, simplified=False)
    status = {row.module: row.status for row in load_weights(plain, trained).rows}
    assert status["visual.trunk.patch_embed"] == "loaded"
    assert status["text.transformer"] == "new"
    assert "left in the source" in status.values()
    before = bits(dict(model.state_dict()))
    with pytest.raises(InputError):
        load_weights(model, {"x": torch.ones(2)})
    assert bits(dict(model.state_dict())) == before


@pytest.mark.parametrize("image", ["open_clip", "timm"])
def test_positions_are_interpolated_as_open_clip_does(image):
    vision = {"layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    if image == "timm":
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    old = open_clip.CLIP(16, vision | {"image_size": 224 if image == "timm" else 32}, text)
    new = open_clip.CLIP(16, vision | {"image_size": 224 if image == "timm" else 64}, text | {"context_length": 30})
    if image == "timm":
        new.visual.set_input_size(64)
    state = dict(old.state_dict())
    resize_pos_embed(state, new)
    resize_text_pos_embed(state, new)
    if image == "timm":
        name = "visual.trunk.pos_embed"
        state[name] = resample_abs_pos_embed(state[name], [4, 4], num_prefix_tokens=1)
    load_weights(new, old)
    for name, value in new.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, msg=name)


def test_inherit_takes_a_run_and_its_trained_blocks(tmp_path, trained):
    this = started(tmp_path, f"inherit.source={trained}")
    wanted = weights_of(trained)
    assert bits(dict(this.model.state_dict())) == bits({name: wanted[name] for name in this.model.state_dict()})
    inside = {p for block in this.blocks for p in block.parameters()}
    assert inside
    for name, parameter in this.model.named_parameters():
        assert parameter.requires_grad == (parameter in inside or name == "logit_scale"), name
    assert "inherited, trains" in "\n".join(this.inheritance.lines())
    # an option of new blocks does not change trained ones
    gain = "model.options.simplify_options={attention_gain: 0.123}"
    this = started(tmp_path, f"inherit.source={trained}", "inherit.blocks=first", gain)
    assert bits(dict(this.model.state_dict())) == bits({name: wanted[name] for name in this.model.state_dict()})


def test_shapes_that_no_tower_takes_are_refused_before_anything_is_made(tmp_path):
    for change, told in (
        ("model.image_size=20", "image_size: expected one that the model takes, got 20: "),
        ("model.image_size=0", "model.image_size: expected"),
        ("model.context_length=1", "model.context_length: expected"),
    ):
        with pytest.raises(InputError, match=told):
            go(tiny.settings(tmp_path, change, "model.name=open_clip:ViT-B-32", "model.options.vision_cfg.layers=1"))
    with pytest.raises(ConfigError, match=r"image_size: expected one value, got 64 and options.vision_cfg.image_size = 32"):
        tiny.settings(tmp_path, "model.image_size=64", "model.options.vision_cfg.image_size=32")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_averaged_weights_are_evaluated_loaded_and_resumed(tmp_path, monkeypatch):
    check_resumed(tmp_path, monkeypatch, 4, ["optim.ema=0.8"])
    plain = tiny.settings(tmp_path, f"run.out={tmp_path / 'plain'}")
    go(plain)
    one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "plain")
    assert bits(one["model"]) == bits(other["model"])  # the average does not affect training
    expected = {}
    updates = record_updates(monkeypatch)
    go(tiny.settings(tmp_path, "optim.ema=0.8"))
    for weights in updates:
        expected = {n: expected[n] + 0.2 * (w - expected[n]) if expected else w for n, w in weights.items()}
    for name, value in expected.items():
        torch.testing.assert_close(one["ema"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    loaded = simplclip.load(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in one["ema"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "backend"), [("fp32", "aot_eager"), pytest.param("bf16", "inductor", marks=pytest.mark.prove)]
)
def test_compiled_towers_resume_bit_for_bit(tmp_path, monkeypatch, precision, backend):
    compiler = mock.Mock(side_effect=functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch, "compile", compiler)
    changes = [f"run.precision={precision}", "data.micro_batch=4", "model.freeze_norms=true"]
    check_resumed(tmp_path, monkeypatch, 4, ["run.compile=true", *changes])
    assert compiler.called
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'plain'}", *changes))
    compiled, plain = (state_of(tmp_path / name)["model"] for name in ("whole", "plain"))
    assert compiled.keys() == plain.keys()
    if precision == "fp32":
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=2e-4, msg=name)
