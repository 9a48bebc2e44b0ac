"""MobileCLIP-S0: the values of the published code, its checkpoint, folding, and training."""

import copy

import example
import pytest
import torch
from mobileclip_s0 import SMALL, SMALL_FEATURES, error, expected, inputs, small_case, small_state, weights
from PIL import Image
from torch import nn

import simplclip
from simplclip import models
from simplclip.models import mobileclip
from simplclip.models.inherit import InheritanceError
from simplclip.models.simplify import TransformerBlock, count_parameters
from simplclip.models.trained import CheckpointError

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
        assert error(tower.encode_tokens(case["tokens"]), case["all_tokens"]) < EXACT
        shorter = tower(case["tokens"][:, :50])
    assert shorter.shape == case["features"].shape


@pytest.mark.slow
def test_every_tensor_of_the_published_checkpoint_has_its_place(model):
    state = weights(1)
    found = mobileclip.from_published(model, state)
    assert len(state) == len(found) == 893
    kinds = [{name: (t.shape, t.dtype) for name, t in state.items()} for state in (found, model.state_dict())]
    assert kinds[0] == kinds[1]
    assert sum(t.sum() for t in found.values()).item() == pytest.approx(sum(t.sum() for t in state.values()).item())
    parts = count_parameters(model)
    assert parts == {"image": 11_406_464, "text": 42_441_216, "other": 1, "total": 53_847_681}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "text_encoder.transformer.0.token_mixer.norm.rbr_skip.bias", None,
            r'Missing key.*"text.first.mixer.norm.bias"',
        ),
        (
            "text_encoder.transformer.1.pre_norm_mha.1.extra", torch.zeros(3),
            r'Unexpected key.*"text.transformer.resblocks.0.attn.extra"',
        ),
        (
            "text_encoder.positional_embedding.pos_embed.pos_embed", torch.zeros(1, 1, 64, 48),
            r"size mismatch for text.positional_embedding.*\[64, 48\].*\[77, 48\]",
        ),
    ],
)  # fmt: skip
def test_a_published_checkpoint_that_does_not_fit(name, value, message, tmp_path):
    state = small_state() | {name: value}
    torch.save({name: t for name, t in state.items() if t is not None}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=f"checkpoint: expected weights that fit the model, got .*bad.pt: .*{message}"):
        small(checkpoint=tmp_path / "bad.pt")


@pytest.mark.slow
def test_a_siclip_inherits_from_the_published_checkpoint(tmp_path):
    torch.save({"state_dict": small_state()}, tmp_path / "small.pt")
    source = small(checkpoint=tmp_path / "small.pt")
    student, _ = simplclip.simplify(small(), blocks={"image": [1], "text": [0, 1]})
    found = simplclip.inherit(student, tmp_path / "small.pt")
    new = {row.module for row in found.rows if row.status == "new"}
    assert new == {"visual.trunk.stages.3.blocks.1", "text.transformer"}
    assert {"visual.trunk.stem", "text.token_embedding", "text.first", "text.last"} <= {*found.names}
    theirs = source.state_dict()
    inherited = {name: t for name, t in student.state_dict().items() if not name.startswith(tuple(f"{n}." for n in new))}
    assert len(inherited) > 700
    torch.testing.assert_close(inherited, {name: theirs[name] for name in inherited}, rtol=0, atol=0)
    with pytest.raises(InheritanceError, match="expected weights of this model's architecture"):
        simplclip.inherit(models.create("siclip-tiny"), tmp_path / "small.pt")


def test_weights_with_former_names_are_refused():
    model = small()
    former = {name.replace("text.first.", "text.layers.0."): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="text tower: expected weights with text.first .*train the model again"):
        model.load_state_dict(former)


def test_simplified_blocks_replace_its_transformer_layers():
    changed, report = simplclip.simplify(small(), towers=["text"])
    assert [(r.index, r.width, r.heads, r.causal) for r in report.replaced] == [
        (i, SMALL["width"], SMALL["heads"], False) for i in (0, 1)
    ]
    assert all(type(block) is TransformerBlock and block.act == "gelu" for block in changed.text.transformer.resblocks)
    assert changed.encode_text(small_case()[1]["tokens"]).isfinite().all()
    _, again = simplclip.simplify(changed, blocks={"text": [-1]}, towers=["text"])
    assert [r.path for r in again.replaced] == ["text.transformer.resblocks.1"]


def batch_norms(module):
    return [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.slow
def test_folded_it_computes_the_same(model):
    folded = simplclip.fold(model)
    image, text = inputs()
    features = expected()
    with torch.no_grad():
        assert 0 < error(folded.encode_image(image), model.encode_image(image)) < FOLDED
        assert 0 < error(folded.encode_text(text), model.encode_text(text)) < FOLDED
        assert error(folded.encode_text(text), features["text"]) < FOLDED
    assert len(batch_norms(model.text)) == 8
    assert not batch_norms(folded.text)
    # Attention blocks have their norm before the first layer, which stays.
    assert batch_norms(folded.visual) == ["trunk.stages.3.blocks.0.norm", "trunk.stages.3.blocks.1.norm"]
    assert [type(part) for part in folded.text.first.mixer.children()] == [nn.Conv2d]
    with torch.no_grad():  # folding a folded model changes nothing
        assert error(simplclip.fold(folded.text)(text), features["text"]) < FOLDED


def gradients(tower, tokens):
    tower.zero_grad()
    tower(tokens).square().sum().backward()
    return {name: p.grad for name, p in tower.named_parameters()}, dict(tower.named_buffers())


def test_gradient_checkpointing_changes_nothing():
    tower, case = small_tower()
    again = copy.deepcopy(tower).train()
    again.set_grad_checkpointing()
    torch.testing.assert_close(gradients(again, case["tokens"]), gradients(tower.train(), case["tokens"]))
    assert all(g.abs().sum() > 0 for g in gradients(again, case["tokens"])[0].values())


def test_lock_leaves_the_last_groups():
    ends = ("text_projection", "last.", "ln_final", "transformer.resblocks.1.")
    model = small()
    for unlocked, last in ((0, ()), (1, ends[:1]), (2, ends), (3, (*ends, "transformer.")), (4, ("",))):
        model.requires_grad_(True)
        model.lock_text_tower(unlocked_layers=unlocked)
        assert all(p.requires_grad == name.startswith(last) for name, p in model.text.named_parameters())


def test_autocast_and_compilation():
    tower, case = small_tower()
    tokens = case["tokens"]
    with torch.no_grad():
        features = tower(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-4 < error(tower(tokens).float(), features) < 5e-2
        torch.testing.assert_close(torch.compile(tower, fullgraph=True, backend="eager")(tokens), features)


def test_by_name():
    image = models.transforms(NAME, train=False)(Image.new("RGB", (300, 280), "red"))
    assert image.shape == (3, 256, 256)
    assert (image.amin((1, 2)).tolist(), image.amax((1, 2)).tolist()) == ([1, 0, 0], [1, 0, 0])  # mean 0, std 1
    tokens = models.tokenizer(NAME)(["a cat"])
    assert (tokens.shape, tokens.max()) == ((1, 77), 49407)
    meta = models.create(NAME, device="meta")
    assert (meta.context_length, meta.vocab_size, meta.visual.preprocess_cfg["interpolation"]) == (77, 49408, "bilinear")


@pytest.mark.slow
def test_an_encoder_of_the_published_checkpoint(model, published):
    image, _ = inputs()
    with torch.no_grad():
        features = model.encode_image(image, normalize=True)
    encoder = simplclip.load(f"{NAME}/{published}")
    assert (encoder.name, encoder.width) == (NAME, 512)
    torch.testing.assert_close(encoder.features("image", image), features)


@pytest.mark.slow
def test_its_text_tower_exports_for_any_batch(tmp_path):
    tower, case = small_tower()
    model = small().eval()
    model.text = tower
    assert example.load("export_onnx").export(model, "text", case["tokens"], tmp_path / "text.onnx") < 1e-4
