"""Models from the settings of a run and from its checkpoints, which are data alone."""

import math

import pytest
import torch
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.models import trained, weights
from support.train import tiny

SECTION = {
    "name": "siclip-tiny",
    "options": tiny.MODEL,
    "image_size": None,
    "context_length": None,
    "grad_checkpointing": False,
}


def state_of(section=SECTION, base="contrastive"):
    """Returns a checkpoint with random weights; its config has settings that concern no model."""
    torch.manual_seed(1)
    others = {"run": {"unknown": 1}, "eval": {"splits": {"a": "pipe:x"}}}
    config = {"model": dict(section), "loss": {"base": base}, **others}
    weights = trained.build_model(section, base).state_dict()
    about = {"format": trained.FORMAT, "version": trained.VERSION, "step": 3}
    return {**about, "config": config, "model": weights}


@pytest.mark.slow
def test_a_model_comes_back_from_its_checkpoint_with_its_averages(tmp_path):
    state = state_of()
    averaged = next(iter(state["model"]))
    torch.save(state | {"ema": {averaged: state["model"][averaged] + 1}}, tmp_path / "last.pt")
    model, raw = trained.load_model(tmp_path / "last.pt")
    assert not model.training
    assert (raw["config"], raw["step"]) == (state["config"], 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"][name] + (name == averaged))


def test_the_sigmoid_base_gives_a_bias(tmp_path):
    torch.save(state_of(base="sigmoid"), tmp_path / "last.pt")
    model = trained.load_model(tmp_path)[0]
    assert model.logit_bias.item() == -10
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    options = tiny.MODEL | {"init_logit_bias": -3.0}
    given = trained.build_model(SECTION | {"options": options}, "sigmoid")
    assert given.logit_bias.item() == -3


def test_height_and_width_of_a_config_are_a_list():
    """YAML and JSON have no tuples."""
    vision = {"image_size": [16, 8], "layers": 1, "width": 8, "patch_size": 8, "head_width": 8}
    options = {"vision_cfg": vision, "text_cfg": {"layers": 1, "width": 8, "heads": 2}}
    section = {"name": "open_clip:ViT-B-32", "options": options}
    assert trained.image_transform(section)(Image.new("RGB", (9, 9))).shape == (3, 16, 8)


SIZES = {"text_cfg": {"layers": 1, "context_length": 20}, "vision_cfg": {"image_size": 32}}


@pytest.mark.parametrize(
    "more",
    [{"options": tiny.MODEL, "image_size": 32, "context_length": 20}, {"options": SIZES}],
    ids=["settings", "options"],
)
def test_sizes_of_images_and_texts(more):
    section = {"name": "siclip-tiny", **more}
    assert trained.shape_of(section, "image_size") == 32
    assert trained.shape_of(section, "context_length") == 20
    model = trained.build_model(section)
    assert model.visual.image_size in (32, (32, 32))
    assert trained.tokenizer(section)(["a red ring"]).shape == (1, 20)
    for train in (False, True):
        image = trained.image_transform(section, train)(Image.new("RGB", (50, 40)))
        assert image.shape == (3, 32, 32)


def test_options_of_another_model():
    message = "model.options: expected options of siclip-tiny, got .*unexpected keyword"
    with pytest.raises(InputError, match=message):
        trained.build_model({"name": "siclip-tiny", "options": {"text_cfg": {"depth": 1}}})


def test_harmless_options_of_tokenizers_and_timm():
    text = {"tokenizer_kwargs": {"clean": "canonicalize"}, "hf_model_name": ""}
    vision = {"timm_model_name": "vit_tiny_patch16_224"}
    trained.check_options({"text_cfg": text, "vision_cfg": vision}, "x")


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save(state_of() | {"format": "x"}, tmp_path / "last.pt")
    with pytest.raises(trained.CheckpointError, match="version 1, .*, got another file"):
        trained.load_model(tmp_path)
    message = "checkpoint: expected a file of weights, got no such file: .*other.pt"
    with pytest.raises(FileNotFoundError, match=message):
        trained.load_model(tmp_path / "other.pt")


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path):
    """torch.load reads a flipped bit of a tensor as another number."""
    path = tmp_path / "w.pt"
    whole = torch.randn(200)
    torch.save({"a": whole}, path)
    content = bytearray(path.read_bytes())
    content[content.index(whole.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], whole)
    with pytest.raises(trained.CheckpointError, match=f"got {path}: it is damaged: .* checksum"):
        weights.read_weights(path)


def test_a_cut_checkpoint_is_damage_that_names_the_file(tmp_path):
    """torch.load says of many lengths that an argument of the system was invalid."""
    path = tmp_path / "w.pt"
    torch.save({name: torch.randn(100) for name in "abcdefgh"}, path)
    content = path.read_bytes()
    for size in range(1, len(content), len(content) // 50):
        path.write_bytes(content[:size])
        with pytest.raises(weights.UnreadableError, match=f"got {path}: "):
            weights.read_weights(path)


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(weights.read_weights(tmp_path / "w.pt")["a"], torch.ones(3))


def test_what_names_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run/best.pt", "run/last.pt", "one/last.pt", "export/open_clip_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tag, preset = "open_clip:ViT-B-32", "siclip-tiny"
    for text, found in (
        ("run", ("run/best.pt", "", "", "run/best.pt")),
        ("one", ("one", "", "", "one/last.pt")),
        ("export", ("export", "", "", "export/open_clip_model.safetensors")),
        ("ViT-B-32/openai", ("ViT-B-32/openai", tag, "openai", "")),
        (f"{tag}/one/last.pt", (f"{tag}/one/last.pt", tag, "", "one/last.pt")),
        (f"{preset}/one/last.pt", (f"{preset}/one/last.pt", preset, "", "one/last.pt")),
        ("minilm", ("minilm", "", "", "minilm")),
    ):
        assert weights.parse_source(text) == weights.Source(*found)
    assert weights.parse_source("run", last=True).label == "run/last.pt"
    assert weights.parse_source(tag, "w.pt") == weights.Source(tag, tag, "", "w.pt")
    assert weights.parse_source(preset, "w.pt") == weights.Source(preset, preset, "", "w.pt")
    for text in ("ViT-B-33/a", preset):
        with pytest.raises(FileNotFoundError, match=f"x: .* no such file: {text}$"):
            weights.parse_source(text).load("x")
