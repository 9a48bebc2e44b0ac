"""Models from the settings of a run and from its checkpoints, which are data alone."""

import contextlib
import math
import random
import sys

import pytest
import torch
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.models import model_names, registry, source, trained, weights
from support.train import tiny
from support.train.runs import bits

SECTION = {
    "name": "siclip-tiny",
    "options": tiny.MODEL,
    "image_size": None,
    "context_length": None,
    "recompute": False,
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
    assert trained._parts(section, trained.build_model(section))["preprocess"].size == (16, 8)


def test_texts_are_as_long_as_in_training_for_a_tower_that_takes_longer_ones(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    transformers.BertConfig(num_hidden_layers=1, **sizes).save_pretrained(tmp_path)
    name = "open_clip:roberta-ViT-B-32"
    vision = {"image_size": 16, "layers": 1, "width": 8, "patch_size": 8, "head_width": 8}
    text = {"hf_model_name": str(tmp_path)}
    model = registry.create(name, embed_dim=8, vision_cfg=vision, text_cfg=text)
    assert model.text.context_length == 512
    monkeypatch.setattr(registry, "tokenizer", lambda _, length=None: length)
    for length in (None, 32):  # None: open_clip's 77
        section = {"name": name, "context_length": length}
        assert trained._parts(section, model)["tokenizer"] == trained.tokenizer(section) == length


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
    message = "image_size, context_length: expected sizes that the model takes, got 30 and 77"
    options = {"vision_cfg": {"layers": (1,) * 4, "width": 8}, "text_cfg": {"layers": 1}}
    with pytest.raises(InputError, match=message):
        trained.build_model({"name": "open_clip:RN50", "options": options, "image_size": 30})


def test_options_that_fetch_or_run_files_are_refused_when_a_run_begins():
    """In checkpoints: tests/hostile/test_hostile_files.py."""
    options = {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}
    got = "got model.options.text_cfg.tokenizer_kwargs = .*may fetch or run"
    message = f"config: expected options of the model's .* {got}"
    with pytest.raises(InputError, match=message):
        trained.build_model(SECTION | {"options": options})


def test_harmless_options_of_tokenizers_and_timm():
    text = {"tokenizer_kwargs": {"clean": "canonicalize"}, "hf_model_name": ""}
    vision = {"timm_model_name": "vit_tiny_patch16_224"}
    trained.check_options({"text_cfg": text, "vision_cfg": vision}, "x")


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save(state_of() | {"format": "x"}, tmp_path / "last.pt")
    with pytest.raises(trained.CheckpointError, match="got a file without format='simplclip'"):
        trained.load_model(tmp_path)
    message = "checkpoint: expected a file of weights, got no such file: .*other.pt"
    with pytest.raises(FileNotFoundError, match=message):
        trained.load_model(tmp_path / "other.pt")


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_in_a_checkpoint_is_an_error_that_names_the_file(tmp_path):
    """torch.load reads most of them as other numbers."""
    path = tmp_path / "w.pt"
    generator = random.Random(0)
    silent = 0
    torch.save({"a": torch.randn(200), "step": 3}, path)
    whole = weights.read_weights(path)
    for _ in range(100):
        byte, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
        flip(path, byte, bit)
        with contextlib.suppress(Exception):
            silent += bits(torch.load(path, weights_only=True)) != bits(whole)
        with contextlib.suppress(trained.CheckpointError):
            assert bits(weights.read_weights(path)) == bits(whole)
        flip(path, byte, bit)
    assert silent > 10
    flip(path, path.read_bytes().index(whole["a"].numpy().tobytes()))
    message = f"got {path}: it is damaged: .* has another checksum"
    with pytest.raises(trained.CheckpointError, match=message):
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


def test_names_of_open_clip_are_known_before_it_is_imported(monkeypatch):
    known = model_names.open_clip_names()
    monkeypatch.delitem(sys.modules, "open_clip")
    # of this process also those that other tests have added
    assert {*model_names.open_clip_names()} <= {*known}
    assert len(model_names.open_clip_names()) > 100


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    message = "source: expected .* got .*: a folder without last.pt or export.json"
    with pytest.raises(FileNotFoundError, match=message):
        source.parse_model(tmp_path).check()
    (tmp_path / "metrics.csv").touch()
    message = "inherit.source: .*: a run that has no checkpoint yet"
    with pytest.raises(FileNotFoundError, match=message):
        source.parse_weights(tmp_path).check("inherit.source")
    message = r"x: .*no such file: ViT-B-33/a; nearest models of open_clip: \['ViT-B-32'"
    with pytest.raises(FileNotFoundError, match=message):
        source.parse_weights("ViT-B-33/a").check("x")
