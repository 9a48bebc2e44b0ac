"""Runs that start from trained weights; inherited blocks; averaged weights; compiled towers."""

import os
import shutil
from unittest import mock

import pytest
import torch
from timm.layers import resample_abs_pos_embed

import simplclip
from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock
from simplclip.train import setup, step
from simplclip.train.config import ConfigError, load
from simplclip.train.setup import make_state
from support.train import tiny
from support.train.runs import bits, go, state_of

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run in which every weight has changed."""
    folder = tmp_path_factory.mktemp("trained")
    go(tiny.settings(folder, "optim.lr=0.01", "optim.ema=0.5"))
    return folder / "run"


def started(folder, *changes):
    return make_state(tiny.settings(folder, *changes), CPU, "fp32")


def weights_of(run):
    """Returns the weights of a run that evaluation uses."""
    state = state_of(run)
    return state["model"] | state.get("ema", {})


def assert_weights(model, wanted):
    state = dict(model.state_dict())
    assert bits(state) == bits({name: wanted[name] for name in state})


@pytest.mark.slow
def test_a_run_starts_from_another_runs_weights_at_other_shapes_and_needs_them_once(
    tmp_path, trained, monkeypatch
):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    monkeypatch.chdir(tmp_path)
    other = ["optim.lr=1e-4", "data.batch_size=4", "model.image_size=64", "model.context_length=20"]
    other.append("model.checkpoint=source")
    state = started(tmp_path, *other)
    old, new = weights_of(source), state.model.state_dict()
    resized = {"visual.trunk.pos_embed", "text.positional_embedding"}
    for name in new.keys() - resized:
        assert torch.equal(new[name], old[name]), name
    grid = resample_abs_pos_embed(old["visual.trunk.pos_embed"], [8, 8], num_prefix_tokens=0)
    assert torch.equal(new["visual.trunk.pos_embed"], grid)
    assert new["text.positional_embedding"].shape == (20, 64)
    assert all(p.requires_grad for p in state.model.parameters())
    assert state.lines[0] == "weights from source"

    text = go(tiny.settings(tmp_path, *other, "run.steps=3"))
    assert "weights from source" in text
    shutil.rmtree(source)
    os.mkdir("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(tmp_path / "run" / "config.yaml", ["run.steps=4"])
    assert "weights from" not in go(config, resume=True)
    encoder = simplclip.load(tmp_path / "run")
    assert encoder.tokenizer(["a"]).shape == (1, 20)
    assert encoder.preprocess.size == (64, 64)


@pytest.mark.parametrize("key", ["model.checkpoint", "inherit.source"])
@pytest.mark.parametrize(
    ("name", "tag", "warns"),
    [
        ("open_clip:MobileCLIP2-S0", "MobileCLIP2-S0/dfndr2b", True),
        ("siclip2-s0", "open_clip:MobileCLIP2-S0/dfndr2b", False),
        ("open_clip:ViT-B-32", "ViT-B-32/openai", False),
        ("siclip-lite0", "efficientnet-lite0", False),
    ],
)
def test_a_tag_whose_images_are_normalised_in_another_way_is_told(tmp_path, key, name, tag, warns):
    changes = [f"model.name={name}", "model.options={}", f"{key}={tag}"]

    def warnings():
        with mock.patch.object(setup, "inherit"), mock.patch.object(setup, "build_model"):
            _, _, lines = setup.load_model(tiny.settings(tmp_path, *changes))
        return [text for text in lines if text.startswith("warning")]

    theirs = "{mean: [0.0, 0.0, 0.0], std: [1.0, 1.0, 1.0]}"
    line = (
        f"warning    {tag} was trained on images normalised by {theirs}; this model's have mean "
        "(0.48145466, 0.4578275, 0.40821073) and std (0.26862954, 0.26130258, 0.27577711). To "
        f"train on the former: --set 'model.options.preprocess={theirs}'"
    )
    assert warnings() == [line] * warns
    changes.append(f"model.options.preprocess={theirs}")
    if warns:
        assert warnings() == []


@pytest.mark.slow
def test_sources_of_a_start(tmp_path, trained):
    wanted = weights_of(trained)
    for source in (trained, trained / "last.pt"):
        model = started(tmp_path, f"model.checkpoint={source}").model
        assert_weights(model, wanted)
    for source, message in (
        ("nowhere.pt", "expected a file of weights, got no such file: nowhere.pt"),
        (tmp_path, "expected .*: a folder without last.pt or open_clip_model.safetensors"),
    ):
        with pytest.raises(ConfigError, match=f"model.checkpoint: {message}"):
            started(tmp_path, f"model.checkpoint={source}")
    with pytest.raises(
        InputError,
        match="expected options of siclip-tiny, got .* multiple values .* 'checkpoint'",
    ):
        started(tmp_path, "model.options.checkpoint=a.pt")


@pytest.mark.slow
def test_inherit_takes_a_run_and_its_trained_blocks(tmp_path, trained):
    state = started(tmp_path, f"inherit.source={trained}")
    assert_weights(state.model, weights_of(trained))
    blocks = [module for module in state.model.modules() if isinstance(module, SimplifiedBlock)]
    inside = {p for block in blocks for p in block.parameters()}
    assert inside
    for name, parameter in state.model.named_parameters():
        assert parameter.requires_grad == (parameter in inside or name == "logit_scale"), name
    assert "trains  " in "\n".join(state.lines)


@pytest.mark.slow
def test_averaged_weights_are_those_of_the_steps_and_loaded(tmp_path, monkeypatch):
    go(tiny.settings(tmp_path, f"run.out={tmp_path / 'plain'}"))
    expected, original = {}, step.update

    def update(state, lr):
        for name, weight in state.model.named_parameters() if not expected else ():
            expected[name] = weight.detach().clone()
        original(state, lr)
        for name, weight in state.model.named_parameters():
            expected[name] += 0.2 * (weight.detach() - expected[name])

    monkeypatch.setattr(step, "update", update)
    go(tiny.settings(tmp_path, "optim.ema=0.8"))
    state = state_of(tmp_path / "run")
    # the average does not affect training
    assert bits(state["model"]) == bits(state_of(tmp_path / "plain")["model"])
    for name, value in expected.items():
        torch.testing.assert_close(state["ema"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    loaded = simplclip.load(tmp_path / "run").model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state["ema"].items())
