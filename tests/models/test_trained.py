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


@pytest.mark.slow
@pytest.mark.parametrize("where", ["last.pt", "."])
def test_a_model_comes_back_from_its_checkpoint_with_its_averages(tmp_path, where):
    state = state_of()
    averaged = next(iter(state["model"]))
    torch.save(state | {"ema": {averaged: state["model"][averaged] + 1}}, tmp_path / "last.pt")
    model, raw = trained.load_model(tmp_path / where)
    assert not model.training
    assert (raw["config"], raw["step"]) == (state["config"], 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"][name] + (name == averaged))


def test_the_sigmoid_base_gives_a_bias(tmp_path):
    torch.save(state_of(base="sigmoid"), tmp_path / "last.pt")
    model = trained.load_model(tmp_path)[0]
    assert model.logit_bias.item() == -10
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    given = trained.build_model(SECTION | {"options": tiny.MODEL | {"init_logit_bias": -3.0}}, "sigmoid")
    assert given.logit_bias.item() == -3


SIZES = {"text_cfg": {"layers": 1, "context_length": 20}, "vision_cfg": {"image_size": 32}}


@pytest.mark.parametrize(
    "more", [{"options": tiny.MODEL, "image_size": 32, "context_length": 20}, {"options": SIZES}], ids=["settings", "options"]
)
def test_sizes_of_images_and_texts(more):
    section = {"name": "siclip-tiny", **more}
    assert [trained.shape_of(section, name) for name in ("image_size", "context_length")] == [32, 20]
    model = trained.build_model(section)
    assert model.visual.image_size in (32, (32, 32))
    assert trained.tokenizer(section)(["a red ring"]).shape == (1, 20)
    for train in (False, True):
        assert trained.image_transform(section, train)(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


@pytest.mark.slow
def test_options_of_another_model():
    with pytest.raises(InputError, match=r"model.options: expected options of siclip-tiny, got .*unexpected keyword"):
        trained.build_model({"name": "siclip-tiny", "options": {"text_cfg": {"depth": 1}}})
    with pytest.raises(InputError, match=r"image_size, context_length: expected sizes that the model takes, got 30 and 77"):
        trained.build_model({"name": "open_clip:RN50", "options": {}, "image_size": 30})


def test_options_that_fetch_or_run_files_are_refused_when_a_run_begins():
    """So that no run ends with a checkpoint that cannot be read. In checkpoints: tests/hostile/test_hostile_files.py."""
    options = {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}
    message = r"config: expected options of the model's .* got model.options.text_cfg.tokenizer_kwargs = .*may fetch or run"
    with pytest.raises(InputError, match=message):
        trained.build_model(SECTION | {"options": options})


def test_harmless_options_of_tokenizers_and_timm():
    trained.check_options({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}, "hf_model_name": ""}}, "x")
    trained.check_options({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}, "x")


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save(state_of() | {"format": "x"}, tmp_path / "last.pt")
    with pytest.raises(trained.CheckpointError, match="got a file without format='simplclip'"):
        trained.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file of weights, got no such file: .*other.pt"):
        trained.load_model(tmp_path / "other.pt")
