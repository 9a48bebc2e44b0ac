"""Models by name: their parts, and that they behave as open_clip models."""

import open_clip
import pytest
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from simplclip import models
from simplclip.common.errors import InputError
from simplclip.models.presets import ShortVocabTokenizer
from simplclip.models.simplify import count_parameters
from simplclip.nn import SimplifiedBlock

VIT = "open_clip:ViT-B-32"
SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "patch_size": 8, "head_width": 8},
    "text_cfg": {"layers": 1, "width": 8, "heads": 2},
}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.create("siclip-tiny").eval()


@pytest.mark.slow
def test_create_repeats_from_the_seed_and_loads_its_own_checkpoint(tmp_path, tiny):
    weights = tiny.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "a.pt")
    torch.manual_seed(0)
    for options in ({}, {"checkpoint": tmp_path / "a.pt"}):
        made = models.create("siclip-tiny", **options).state_dict()
        torch.testing.assert_close(made, weights, rtol=0, atol=0)
    with pytest.raises(ValueError, match="checkpoint: .* that fit the model, got .*size mismatch"):
        models.create("siclip-tiny", checkpoint=tmp_path / "a.pt", embed_dim=64)


def test_overrides():
    model = models.create(
        "siclip-tiny",
        simplify_options={"towers": ["text"], "mlp_ratio": 2.0},
        embed_dim=32,
        output_dict=True,
        text_cfg={"layers": 1},
        vision_cfg={"image_size": 48},
    )
    assert list(model.simplify_report.replaced) == ["text.transformer.resblocks.0"]
    block = model.text.transformer.resblocks[0]
    # options are merged into the configuration and do not replace it
    assert (block.width, block.hidden) == (256, 512)
    out = model(torch.randn(2, 3, 48, 48), torch.randint(0, 99, (2, 16)))
    assert out["image_features"].shape == (2, 32)
    assert len(models.create("siclip-tiny").text.transformer.resblocks) == 2


def test_plain_open_clip_models(tiny):
    model = models.create(VIT, **SMALL)
    assert len(model.visual.transformer.resblocks) == len(model.transformer.resblocks) == 1
    assert not any(isinstance(m, SimplifiedBlock) for m in model.modules())
    assert models.tokenizer(VIT)(["x"]).shape == (1, 77)
    image = models.transforms(VIT, train=False)(Image.new("L", (9, 9)))
    assert image.shape == (3, 224, 224)
    text = {"towers": ["text"]}
    simple = models.create(VIT, simplify_options=text, **SMALL)
    assert list(simple.simplify_report.replaced) == ["transformer.resblocks.0"]
    with pytest.raises(ValueError, match="simplify_options: expected none"):
        models.create(VIT, simplified=False, simplify_options=text)
    whole = models.create("siclip-tiny", simplified=False)
    assert count_parameters(whole) == tiny.simplify_report.before


@pytest.mark.parametrize(
    ("name", "near"), [("siclip2-s1", "siclip2-s0"), ("open_clip:ViT-B-23", "open_clip:ViT-B-32")]
)
def test_unknown_names_list_the_nearest(name, near):
    message = rf"name: expected one of .*got '{name}'; nearest: .*'{near}'"
    with pytest.raises(ValueError, match=message):
        models.create(name)


def test_short_vocabulary_is_a_prefix_of_clips_and_decodes():
    full, short = open_clip.SimpleTokenizer(), models.tokenizer("siclip-tiny")
    assert short.vocab_size == len(short.encoder) == len(short.decoder) == 8192
    assert (short.sot_token_id, short.eot_token_id) == (8190, 8191)
    for text in ("face with tears of joy", "flag: Côte d’Ivoire", "ok!"):
        ids = short(text)[0]
        assert ids.max() == 8191
        assert ids[0] == 8190
        assert short.decode(short.encode(text)) == full.decode(full.encode(text))
    assert short.encode("cat") == full.encode("cat")  # frequent words keep their ids
    assert short(["word " * 40]).shape == (1, 16)
    assert short(["word " * 40])[0, -1] == 8191
    whole = ShortVocabTokenizer(full.vocab_size)
    assert whole.encoder == full.encoder
    assert whole.bpe_ranks == full.bpe_ranks


PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5], "interpolation": "bilinear"}


@pytest.mark.parametrize("fields", [PIXELS, PIXELS | {"resize_mode": "squash", "fill_color": 9}])
def test_preprocessing_of_other_fields_is_that_of_open_clip(fields):
    """As open_clip's factory makes it with force_preprocess_cfg."""
    model = models.create(VIT, **SMALL, preprocess=fields)
    expected = merge_preprocess_dict(PreprocessCfg(size=(16, 16)), fields)
    assert get_model_preprocess_cfg(model) == expected
    image = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    transform = models.transforms(VIT, train=False, image_size=16, preprocess=fields)
    theirs = image_transform_v2(PreprocessCfg(**expected), is_train=False)
    torch.testing.assert_close(transform(image), theirs(image), rtol=0, atol=0.05)
    plain = models.transforms(VIT, train=False, image_size=16)
    assert (plain(image) - theirs(image)).abs().max() > 0.5


def test_preprocessing_that_open_clip_does_not_have():
    fields = {"interpolation": ["x"]}
    message = r"preprocess.interpolation: .* bilinear, got \['x'\]"
    with pytest.raises(InputError, match=message):
        models.create(VIT, **SMALL, preprocess=fields)
    with pytest.raises(InputError, match=message):
        models.transforms(VIT, train=True, preprocess=fields)
