"""Models from the settings of a run and from its checkpoints, which are data alone."""

import math

import pytest
import tiny
import torch
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.models import trained

SECTION = {"name": "siclip-tiny", "options": tiny.MODEL, "image_size": None, "context_length": None, "recompute": False}


def state_of(section=SECTION, base="contrastive", **more):
    """Returns a checkpoint with random weights. Its config also has settings that concern no model."""
    torch.manual_seed(1)
    config = {"model": dict(section), "loss": {"base": base}, "run": {"unknown": 1}, "eval": {"splits": {"a": "pipe:x"}}}
    weights = trained.build_model(section, base).state_dict()
    return {"format": trained.FORMAT, "version": trained.VERSION, "step": 3, "config": config, "model": weights} | more


@pytest.mark.parametrize("where", ["last.pt", "."])
def test_a_model_comes_back_from_its_checkpoint_with_its_averages(tmp_path, where):
    state = state_of()
    averaged = next(iter(state["model"]))
    torch.save(state | {"ema": {averaged: state["model"][averaged] + 1}}, tmp_path / "last.pt")
    model, config, raw = trained.load_model(tmp_path / where)
    assert not model.training
    assert config == state["config"] == raw["config"]
    assert raw["step"] == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"][name] + (name == averaged))


def test_the_sigmoid_base_gives_a_bias(tmp_path):
    torch.save(state_of(base="sigmoid"), tmp_path / "last.pt")
    model = trained.load_model(tmp_path)[0]
    assert model.logit_bias.item() == -10
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    given = trained.build_model(SECTION | {"options": tiny.MODEL | {"init_logit_bias": -3.0}}, "sigmoid")
    assert given.logit_bias.item() == -3


@pytest.mark.parametrize(
    "section",
    [
        {"name": "siclip-tiny", "options": tiny.MODEL, "image_size": 32, "context_length": 20},
        {
            "name": "siclip-tiny",
            "options": {"text_cfg": {"layers": 1, "context_length": 20}, "vision_cfg": {"image_size": 32}},
        },
    ],
    ids=["settings", "options"],
)
def test_sizes_of_images_and_texts(section):
    assert [trained.shape_of(section, name) for name in ("image_size", "context_length")] == [32, 20]
    model = trained.build_model(section)
    assert model.visual.image_size in (32, (32, 32))
    assert trained.tokenizer(section)(["a red ring"]).shape == (1, 20)
    for train in (False, True):
        assert trained.image_transform(section, train)(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_options_of_another_model():
    with pytest.raises(InputError, match=r"model.options: expected options of siclip-tiny, got .*unexpected keyword"):
        trained.build_model({"name": "siclip-tiny", "options": {"force_patch_dropout": 1}})
    with pytest.raises(InputError, match=r"image_size: expected one that the model takes, got 30"):
        trained.build_model({"name": "open_clip:RN50", "options": {}, "image_size": 30})


REFUSED = {
    "a download": ({"pretrained_image": True}, "pretrained_image = 'True'"),
    "code of a tokenizer": (
        {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}},
        "text_cfg.tokenizer_kwargs = \"{'trust_remote_code': True}\"",
    ),
}


@pytest.mark.parametrize(("options", "got"), REFUSED.values(), ids=REFUSED)
def test_options_that_fetch_or_run_files_are_refused(options, got, tmp_path):
    """In a checkpoint, and already when a run begins, so that no run ends with a checkpoint that cannot be read."""
    message = f"expected options of the model's architecture, got model.options.{got}, which may fetch or run files"
    section = SECTION | {"options": options}
    with pytest.raises(InputError) as raised:
        trained.build_model(section)
    assert str(raised.value) == f"config: {message}"
    state = state_of()
    state["config"]["model"] = section
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(trained.CheckpointError) as raised:
        trained.load_model(tmp_path)
    assert str(raised.value) == f"{tmp_path}: config: {message}"


def test_harmless_options_of_tokenizers_and_timm():
    trained.check_options({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}, "hf_model_name": ""}}, "x")
    trained.check_options({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "got a file without format='simplclip'"),
        ({"version": 2}, "expected checkpoint version 1 or lower, got 2, written by a newer simplclip"),
        ({"step": "x"}, "expected a checkpoint with a config and weights, got another one"),
        ({"config": {"model": {"name": "siclip-tini"}}}, "name: expected one of .*nearest: .*siclip-tiny"),
        ({"config": {"model": {"name": "siclip-tiny", "options": [1]}}}, "expected weights of|expected options of"),
    ],
)
def test_files_that_are_no_checkpoint(change, message, tmp_path):
    torch.save(state_of() | change, tmp_path / "last.pt")
    with pytest.raises(trained.CheckpointError, match=message):
        trained.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint: no such file"):
        trained.load_model(tmp_path / "other.pt")
