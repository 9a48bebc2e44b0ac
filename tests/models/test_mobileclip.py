"""MobileCLIP-S0: the values of the published code, its checkpoint, and training."""

import copy

import pytest
import torch

import simplclip
from simplclip import models
from simplclip.models import mobileclip
from simplclip.models.weights import CheckpointError
from support.models import mobileclip_s0 as case
from support.models.mobileclip_s0 import all_tokens, error

NAME = "mobileclip-s0"
EXACT = 2e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model with a published checkpoint, the weights of seed 1."""
    path = tmp_path_factory.mktemp("published") / "mobileclip_s0.pt"
    torch.save(case.weights(1), path)
    return models.create(NAME, checkpoint=path).eval()


def small(**options):
    torch.manual_seed(0)
    return models.create(NAME, text_cfg=case.SMALL, embed_dim=case.SMALL_FEATURES, **options)


@pytest.fixture(scope="module")
def small_tower():
    """The small text tower with its published weights."""
    model, published = small().eval(), case.small_state()
    loaded = mobileclip.from_published(model, published)
    assert len(loaded) == len(published)
    model.load_state_dict(loaded)
    return model.text


@pytest.mark.slow
def test_it_computes_what_the_published_code_does(model):
    image, text = case.inputs()
    features = case.expected()
    with torch.no_grad():
        assert error(model.encode_image(image), features["image"]) < EXACT
        assert error(model.encode_text(text), features["text"]) < EXACT
    assert model.logit_scale.item() == 3.0


def test_the_small_text_tower(small_tower):
    _, expected = case.small_case()
    tokens = expected["tokens"]
    with torch.no_grad():
        assert error(small_tower(tokens), expected["features"]) < EXACT
        assert error(all_tokens(small_tower, tokens), expected["all_tokens"]) < EXACT
        assert small_tower(tokens[:, :50]).shape == expected["features"].shape


@pytest.mark.slow
def test_a_published_checkpoint_that_does_not_fit(tmp_path):
    """The message has the model's own names, with which it can be searched."""
    state = case.small_state()
    del state["text_encoder.transformer.0.token_mixer.norm.rbr_skip.bias"]
    torch.save(state, tmp_path / "bad.pt")
    missing = '.*Missing key.*"text.first.mixer.norm.bias"'
    message = f"checkpoint: expected weights that fit .* got .*bad.pt: {missing}"
    with pytest.raises(CheckpointError, match=message):
        small(checkpoint=tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="expected weights of this model's architecture"):
        simplclip.inherit(models.create("siclip-tiny"), tmp_path / "bad.pt")


def gradients(tower, tokens):
    tower.zero_grad()
    tower(tokens).square().sum().backward()
    return {name: p.grad for name, p in tower.named_parameters()}, dict(tower.named_buffers())


def test_gradient_checkpointing_changes_nothing(small_tower):
    tokens = case.small_case()[1]["tokens"]
    tower, again = (copy.deepcopy(small_tower).train() for _ in range(2))
    again.set_grad_checkpointing()
    torch.testing.assert_close(gradients(again, tokens), gradients(tower, tokens))
    assert all(g.abs().sum() > 0 for g in gradients(again, tokens)[0].values())
