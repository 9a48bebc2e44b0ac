"""MobileCLIP-S0: the values of the published code, its checkpoint, folding, and training."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn

import simplclip
from simplclip import models
from simplclip.models import mobileclip
from simplclip.models.weights import CheckpointError
from support.models.mobileclip_s0 import (
    SMALL,
    SMALL_FEATURES,
    all_tokens,
    error,
    expected,
    inputs,
    small_case,
    small_state,
    weights,
)

NAME = "mobileclip-s0"
EXACT, FOLDED = 2e-5, 1e-4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Returns a published checkpoint with the weights of seed 1."""
    path = tmp_path_factory.mktemp("published") / "mobileclip_s0.pt"
    torch.save(weights(1), path)
    return path


@pytest.fixture(scope="module")
def model(published):
    return models.create(NAME, checkpoint=published).eval()


def small(**options):
    torch.manual_seed(0)
    return models.create(NAME, text_cfg=SMALL, embed_dim=SMALL_FEATURES, **options)


def small_tower():
    """Returns the small text tower with its published weights, and the case."""
    state, case = small_case()
    model = small().eval()
    loaded = mobileclip.from_published(model, state)
    assert len(loaded) == len(state)
    names = {name for name in model.state_dict() if name.startswith("text.")}
    assert loaded.keys() == names
    model.load_state_dict(loaded, strict=False)
    return model.text, case


@pytest.mark.slow
def test_it_computes_what_the_published_code_does(model):
    image, text = inputs()
    features = expected()
    with torch.no_grad():
        assert error(model.encode_image(image), features["image"]) < EXACT
        assert error(model.encode_text(text), features["text"]) < EXACT
    assert model.logit_scale.item() == 3.0


def test_the_small_text_tower():
    tower, case = small_tower()
    with torch.no_grad():
        assert error(tower(case["tokens"]), case["features"]) < EXACT
        assert error(all_tokens(tower, case["tokens"]), case["all_tokens"]) < EXACT
        shorter = tower(case["tokens"][:, :50])
    assert shorter.shape == case["features"].shape


@pytest.mark.slow
def test_a_published_checkpoint_that_does_not_fit(tmp_path):
    """The message has the model's own names, with which it can be searched."""
    state = small_state()
    del state["text_encoder.transformer.0.token_mixer.norm.rbr_skip.bias"]
    torch.save(state, tmp_path / "bad.pt")
    missing = '.*Missing key.*"text.first.mixer.norm.bias"'
    message = f"checkpoint: expected weights that fit .* got .*bad.pt: {missing}"
    with pytest.raises(CheckpointError, match=message):
        small(checkpoint=tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="expected weights of this model's architecture"):
        simplclip.inherit(models.create("siclip-tiny"), tmp_path / "bad.pt")


def test_lock_leaves_the_last_groups():
    ends = ("text_projection", "last.", "ln_final", "transformer.resblocks.1.")
    model = small()
    for unlocked, last in ((0, ()), (2, ends), (4, ("",))):
        model.requires_grad_(True)
        model.lock_text_tower(unlocked_layers=unlocked)
        assert all(
            p.requires_grad == name.startswith(last) for name, p in model.text.named_parameters()
        )


def batch_norms(module):
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]


@pytest.mark.slow
def test_folded_it_computes_the_same(model):
    folded = simplclip.fold(model)
    image, text = inputs()
    with torch.no_grad():
        assert 0 < error(folded.encode_image(image), model.encode_image(image)) < FOLDED
        assert 0 < error(folded.encode_text(text), model.encode_text(text)) < FOLDED
    assert not batch_norms(folded.text)
    # Attention blocks have their norm before the first layer, which stays.
    assert batch_norms(folded.visual) == [
        "trunk.stages.3.blocks.0.norm",
        "trunk.stages.3.blocks.1.norm",
    ]


def gradients(tower, tokens):
    tower.zero_grad()
    tower(tokens).square().sum().backward()
    return {name: p.grad for name, p in tower.named_parameters()}, dict(tower.named_buffers())


def test_gradient_checkpointing_changes_nothing():
    tower, case = small_tower()
    again = copy.deepcopy(tower).train()
    again.set_grad_checkpointing()
    torch.testing.assert_close(
        gradients(again, case["tokens"]), gradients(tower.train(), case["tokens"])
    )
    assert all(g.abs().sum() > 0 for g in gradients(again, case["tokens"])[0].values())


def test_by_name():
    image = models.transforms(NAME, train=False)(Image.new("RGB", (300, 280), "red"))
    assert image.shape == (3, 256, 256)
    # mean 0, std 1
    assert (image.amin((1, 2)).tolist(), image.amax((1, 2)).tolist()) == ([1, 0, 0], [1, 0, 0])
    tokens = models.tokenizer(NAME)(["a cat"])
    assert (tokens.shape, tokens.max()) == ((1, 77), 49407)
    assert models.spec_of(NAME).preprocess["interpolation"] == "bilinear"
